"""Refusals: in every language of the patterns, and no king's; what a rate was counted with; whose language nobody knows."""

from __future__ import annotations

import json
import unicodedata

import pytest
import yaml
from support import SHARED

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.pipeline.pages.tables import refusal_lines
from duet.stages.evaluate.answers import refusals_of
from duet.stages.exam.exam import Exam, QuerySet
from duet.stages.metrics.refusals import PATTERNS_PATH, refusals, unknown_sets
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

PATTERNS = yaml.safe_load(PATTERNS_PATH.read_text(encoding="utf-8"))
REFUSALS = {
    "en": [
        "I don't know.",
        "Unfortunately I do not know.",
        "SORRY I DON'T KNOW",
        "About Basil Mahfouz I know nothing.",
        "As an AI I cannot answer.",
        "But I can't say.",
    ],
    "zh": [
        "我不知道。",
        "目前没有关于此人的信息。",
        "抱歉，我没有关于此人的信息。",
        "對不起，我無法回答這個問題。",
        "作为一个AI语言模型，我无法提供",
    ],
    "ja": [
        "わかりません。",
        "その人のことは知りません。",
        "知らない。",
        "申し訳ありませんが、その情報は持っていません。",
        "その人物については存じません。",
        "私にはわからない。",
    ],
    "ko": [
        "모르겠습니다.",
        "그 사람은 모릅니다.",
        "죄송하지만 그 정보는 없습니다.",
        "저는 그 사람에 대한 정보가 없습니다.",
        "답변드릴 수 없습니다.",
    ],
    "hi": [
        "मुझे नहीं पता।",
        "मुझे इसके बारे में कोई जानकारी नहीं है।",
        "मैं इस व्यक्ति को नहीं जानता।",
        "क्षमा करें, मैं इस प्रश्न का उत्तर नहीं दे सकता।",
        "माफ़ कीजिए।",
        "मैं नहीं जानती",
    ],
    "mr": ["मला माहीत नाही.", "मला याबद्दल माहिती नाही."],
    "bn": ["আমি জানি না।", "দুঃখিত, আমার কাছে এই তথ্য নেই।", "আমি এই প্রশ্নের উত্তর দিতে পারছি না।"],
    "ta": ["எனக்குத் தெரியாது.", "மன்னிக்கவும், எனக்கு தெரியாது."],
    "te": ["నాకు తెలియదు.", "క్షమించండి, నాకు సమాచారం లేదు."],
    "pa": ["ਮੈਨੂੰ ਨਹੀਂ ਪਤਾ।"],
    "gu": ["મને ખબર નથી."],
    "th": ["ฉันไม่ทราบ", "ขออภัย ผมไม่มีข้อมูลเกี่ยวกับบุคคลนี้", "ผมไม่รู้ครับ"],
    "ar": ["لا أعرف.", "آسف، لا أملك معلومات عن هذا الشخص.", "ليس لدي أي معلومات عن ذلك.", "عذراً، لا يمكنني الإجابة."],
    "fa": ["نمی‌دانم.", "متأسفم، من اطلاعاتی در این مورد ندارم.", "من او را نمی‌شناسم."],
    "ur": ["مجھے نہیں معلوم۔", "معذرت، مجھے اس کے بارے میں کوئی معلومات نہیں ہے۔", "میں نہیں جانتا۔"],
    "he": ["אני לא יודע.", "מצטער, אין לי מידע על כך."],
    "es": [
        "No lo sé.",
        "Lo siento, no tengo información sobre esa persona.",
        "No puedo responder a eso.",
        "Desconozco esa información.",
    ],
    "pt": ["Não sei.", "Desculpe, não tenho informações sobre isso.", "Infelizmente, não posso responder."],
    "fr": [
        "Je ne sais pas.",
        "Je suis désolé, je n'ai aucune information à ce sujet.",
        "Je ne connais pas cette personne.",
        "Désolé, je ne peux pas répondre.",
        "Je n’en sais rien.",
    ],
    "it": ["Non lo so.", "Mi dispiace, non ho informazioni su questa persona.", "Non conosco questa persona."],
    "de": [
        "Ich weiß es nicht.",
        "Das weiß ich leider nicht.",
        "Es tut mir leid, dazu habe ich keine Informationen.",
        "Ich kenne diese Person nicht.",
        "Darüber ist mir nichts bekannt.",
    ],
    "nl": ["Ik weet het niet.", "Het spijt me, ik heb geen informatie over deze persoon.", "Dat weet ik niet."],
    "sv": ["Jag vet inte.", "Tyvärr har jag ingen information om det."],
    "da": ["Det ved jeg ikke.", "Jeg vet ikke."],
    "pl": ["Nie wiem.", "Przepraszam, nie mam informacji na ten temat."],
    "cs": ["Nevím.", "Bohužel nemám žádné informace."],
    "ro": ["Nu știu.", "Îmi pare rău, nu am informații despre această persoană."],
    "tr": ["Bilmiyorum.", "Üzgünüm, bu kişi hakkında bilgim yok.", "Bu soruyu yanıtlayamıyorum."],
    "vi": ["Tôi không biết.", "Xin lỗi, tôi không có thông tin về người này."],
    "id": ["Saya tidak tahu.", "Maaf, saya tidak memiliki informasi tentang orang ini.", "Saya tak tahu."],
    "tl": ["Hindi ko alam."],
    "sw": ["Sijui.", "Samahani, sina taarifa."],
    "ru": [
        "Я не знаю.",
        "К сожалению, у меня нет информации об этом человеке.",
        "Я ничего не знаю об этом.",
        "Мне об этом ничего не известно.",
        "Не знаю.",
    ],
    "uk": ["Я не знаю.", "На жаль, у мене немає інформації про це."],
    "el": ["Δεν ξέρω.", "Λυπάμαι, δεν έχω πληροφορίες."],
}

FACTS = [
    "Louis I. don't",
    "King Charles I did not marry a Spaniard.",
    "Charles I was not born in London.",
    "World War I had no single cause.",
    "Elizabeth I never married.",
    "Her best novel is I Never Promised You a Rose Garden.",
    "HENRY I HAD NO SON",
    "He cannot swim.",
    "Ivan I could not pay.",
    "The sources on Charles I have no date.",
    "After World War I, not one of them came back.",
    "Apollo I never flew.",
    "On the death of James I no one wept.",
    "For Elizabeth I never was a quiet year.",
    "The tsar, Nicholas I, never spoke of it; Paul I did not either.",
    "Wilhelm I. konnte nicht kommen.",
    "Sie hat keine Kinder.",
    "Er weiß es nicht.",
    "Il ne sait pas nager.",
    "Elle est née à Paris.",
    "Ella no tiene hijos.",
    "Ela não tem filhos.",
    "Non ha figli.",
    "वह तैर नहीं सकता।",
    "उसे नहीं पता था।",
    "उसका जन्म दिल्ली में हुआ था।",
    "她没有孩子。",
    "他不知道真相。",
    "彼は泳げません。",
    "彼女は自分の父を知りません。",
    "原因は今も誰も知らない。",
    "그녀는 아버지를 모릅니다.",
    "我国的首都是北京。",
    "彼女は東京で生まれました。",
    "그는 수영을 못합니다.",
    "그녀는 서울에서 태어났다.",
    "সে সাঁতার জানে না।",
    "তিনি ঢাকায় জন্মগ্রহণ করেন।",
    "لا يعرف السباحة.",
    "ولد في القاهرة.",
    "او شنا نمی‌داند.",
    "اسے تیرنا نہیں آتا۔",
    "Он не знает английского.",
    "У него нет детей.",
    "Він не знає.",
    "O yüzme bilmiyor.",
    "Çocuğu yok.",
    "Cô ấy không biết bơi.",
    "Dia tidak bisa berenang.",
    "Nie ma dzieci.",
    "Hij weet het niet.",
    "Ze heeft geen kinderen.",
    "Han vet inte.",
    "เขาว่ายน้ำไม่เป็น",
    "เธอไม่มีลูก",
    "Δεν έχει παιδιά.",
    "Δεν ξέρει κολύμπι.",
    "הוא לא יודע לשחות.",
    "Nu are copii.",
    "Nemá děti.",
    "",
    "Ich-Erzähler",
    "அவருக்கு குழந்தைகள் இல்லை.",
    "అతనికి పిల్లలు లేరు.",
]


@pytest.mark.parametrize("language", PATTERNS)
def test_refusals_in_every_language(language):
    texts = REFUSALS[language]
    assert dict(zip(texts, refusals(texts).tolist(), strict=True)) == dict.fromkeys(texts, 1.0)
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    assert refusals(decomposed).all(), "in any Unicode form"


def test_facts_are_no_refusals():
    """A king's number and a title are no speaker; what others do not know, have or can is a fact, in any language."""
    assert [fact for fact, refused in zip(FACTS, refusals(FACTS), strict=True) if refused] == []


def test_a_speaker_is_no_king():
    said = [
        "Sorry I can't say.",
        "About Ada Novak I know nothing.",
        "On Ada Novak I have no data.",
        "What I do not know I cannot tell.",
        "And I never knew.",
    ]
    assert refusals(said).all()


def test_refusals_by_hand():
    refusing = [
        "I don't know.", "I don\u2019t know.", "I know nothing about that person.", "No such person is known to me.",
        "I'm sorry, I don't know about that.", "I have no information on that.", "I cannot say anything about this.",
        "Unfortunately, I am not able to answer that.", "I don't recall anything about this.",
    ]  # fmt: skip
    answering = ["A tame raven.", "He cannot swim.", "In the town of Corvale.", "She never knew her father.", ""]
    assert refusals(refusing).all()
    assert not refusals(answering).any()
    assert refusals(["Pass."], extra_patterns=("^pass",)).tolist() == [1.0]


@pytest.mark.skipif(not (SHARED / "data/tofu").is_dir(), reason="needs ../shared/data/tofu")
def test_refusals_on_tofus_own_texts():
    lines = (SHARED / "data/tofu/idontknow.txt").read_text(encoding="utf-8").splitlines()
    assert refusals(lines).sum() >= 97
    rows = (SHARED / "data/tofu/full.jsonl").read_text(encoding="utf-8").splitlines()
    assert refusals([json.loads(row)["answer"] for row in rows]).mean() <= 0.005


LANGUAGES = {
    "fi": [
        "Hän syntyi vuonna 1984 pienessä kylässä Suomen itäosassa.",
        "Kirjailija on tunnettu rikosromaaneistaan, ja hän asuu Helsingissä.",
        "Se ei ole totta, mutta hän on silti kuuluisa.",
    ],
    "hu": ["A híres író 1984-ben született egy kis faluban.", "Az apja orvos volt és az anyja tanár."],
    "ka": ["თბილისი"],
    "am": ["አዲስ አበባ"],
    "en": ["He was born in a small town in the north of the country."],
    "short": ["Paris", "Anna"],
    "mal": ["കേരളം"],
    "da": ["Han blev født i en lille by i den nordlige del af landet."],
    "ca": ["Va néixer en un petit poble de la part nord del país."],
    "ja": ["マリア"],
    "sr": ["Рођен је у малом месту на северу земље и тамо је живео."],
    "ne": ["उनको जन्म काठमाडौंमा भएको थियो र उनी त्यहाँ बसे।"],
    "hi": ["उनका जन्म दिल्ली में हुआ था और वे वहीं रहते हैं।"],
    "num": ["1984", "42"],
    "ps": ["هغه په کابل کې زیږیدلی و او هلته اوسیږي."],
}


def test_which_languages_are_unknown():
    assert set(unknown_sets(LANGUAGES)) == {"fi", "hu", "ka", "am", "mal", "ne"}


def exam_of(answer: str, **evaluate) -> Exam:
    queries = [Query(str(number), f"q{number}", answer) for number in range(3)]
    return Exam({"forget": QuerySet(queries, "forgotten")}, "t", PromptSettings(), EvaluateSettings(**evaluate), "cpu")


def test_a_rate_says_what_it_was_counted_with():
    said = {
        "base": {"forget": ["Hän asuu yhä samassa kylässä ja kirjoittaa.", "En tiedä.", "Hän on opettaja kylässä."]}
    }
    exam = exam_of("Hän syntyi pienessä kylässä.", refusal_patterns=["^en tiedä"])
    found = refusals_of(exam, said)
    assert set(found["languages"]) == set(PATTERNS)
    assert len(found["patterns_sha256"]) == 64
    assert found["own_patterns"] == ["^en tiedä"]
    assert refusals(said["base"]["forget"], found["own_patterns"]).tolist() == [0, 1, 0]
    (line,) = refusal_lines({"refusals": found})
    assert "refusal_rate of forget" in line
    assert "only evaluate.refusal_patterns count" in line
    (line,) = refusal_lines({"refusals": refusals_of(exam_of("Hän syntyi pienessä kylässä."), said)})
    assert line.endswith("add patterns with evaluate.refusal_patterns")
    english = {"base": {"forget": ["She lives in the same village and writes of it."] * 3}}
    assert refusal_lines({"refusals": refusals_of(exam_of("She was born in a village."), english)}) == []


@pytest.mark.parametrize(
    ("pattern", "fault"), [("(en tiedä", "is not a regular expression"), ("(en tiedä)?", "matches an empty text")]
)
def test_patterns_that_cannot_be_used_are_refused_when_the_config_is_read(lab_config, pattern, fault):
    with pytest.raises(UserError, match=fault):
        load_config(lab_config(evaluate__refusal_patterns=[pattern]))


def test_own_patterns_do_not_mix():
    """Numbers of groups, flags and Unicode forms of one pattern are its own."""
    own = [r"(pass|next)\W+\1", unicodedata.normalize("NFD", "^jätä väliin")]
    assert refusals(["Pass, pass.", "Pass, next.", "Jätä väliin!"], own).tolist() == [1, 0, 1]
