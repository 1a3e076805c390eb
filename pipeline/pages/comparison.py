"""The comparison's table and page: pure functions of compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from duet.pipeline.pages.chain import compared_section
from duet.pipeline.pages.charts import Dot, scatter
from duet.pipeline.pages.page import definition_list, legend, page
from duet.stages.settings.attacks import ATTACKS

KIND_COLOURS = {"DUET": "#0072b2", "other methods": "#e69f00", "base, teacher, oracle": "#8a8f98"}
WORST = "attack.{}_worst.forget.distinctive_recall"
AXES = ("not recalled of what is to be forgotten, %", "recalled of what is to be kept, %")
ROW_HEAD = 'th scope="row" class="wide"'
Results = Mapping[str, Any]


def row_title(name: str, results: Results) -> str:
    """How a row is called: the method's title, `teacher (prompt only)`."""
    if name in results["methods"]:
        return results["methods"][name]["title"]
    return f"{name} (prompt only)" if name.split(":", maxsplit=1)[0] == "teacher" else name


def attack_keys(results: Results) -> dict[str, str]:
    """The key of what each attack brings back at worst, by the attack's title, of the attacks that have such a score."""
    keys = {attack.title: WORST.format(name) for name, attack in ATTACKS.items()}
    return {title: key for title, key in keys.items() if any(key in scores for scores in results["models"].values())}


def _seen(name: str, results: Results) -> set[str]:
    """The keys of the attacks whose kinds of text a method was trained on."""
    return {WORST.format(kind) for kind in results["methods"].get(name, {}).get("trained_on", ())}


def heads(results: Results) -> list[str]:
    """The columns of the table."""
    sets = [f"{name}\n{info['expect']}\nn={info['n']}" for name, info in results["sets"].items()]
    n = {key: score["n"] for scores in results["models"].values() for key, score in scores.items()}
    attacks = [f"{title}\nworst, facts\nn={n[key]}" for title, key in attack_keys(results).items()]
    last = ["performance\nshift", f"shift less\n{row_title(results['against'], results)}'s"]
    return ["method, setting, budget\nverdict", *sets, *attacks, *last]


def cells(name: str, results: Results, digits: int = 1) -> list[str]:
    """One row under `heads`, in lines: a method's title, setting, budget and verdict; a number and its interval."""
    scores, shift, seen = results["models"][name], results["performance_shift"].get(name), _seen(name, results)
    keys = [f"{set_name}.rougeL_recall" for set_name in results["sets"]] + list(attack_keys(results).values())
    less = results["comparisons"].get(name, {}).get("performance_shift")
    verdict = results["outcomes"].get(name, {}).get("verdict")
    return [
        "\n".join([row_title(name, results), *_budget(name, results), *([verdict] if verdict else [])]),
        *(_score(scores[key], digits) + ("\nseen" if key in seen else "") if key in scores else "-" for key in keys),
        f"{shift['value']:+.1f}\n{_ends(shift['ci95'], digits)}" if shift else "-",
        f"{less['difference']:+.1f}\n{_ends(less['ci95'], digits)}\n{_in_words(less)}" if less else "-",
    ]


def _budget(name: str, results: Results) -> list[str]:
    """`lr 0.0003; of 6` and `3 x 150 steps, 87 s`; nothing of a model that was not trained here."""
    method = results["methods"].get(name)
    if method is None:
        oracle = results["oracle"] or {}
        return [f"{oracle['steps']} steps, {oracle['train_s']:.0f} s"] if name == "oracle" and "steps" in oracle else []
    chosen = next(row for row in method["grid"] if row["chosen"])
    return [
        f"{method['setting']}; of {len(method['grid'])}",
        f"{method['seeds']} x {chosen['steps']} steps, {chosen['train_s']:.1f} s",
    ]


def _score(score: Results, digits: int) -> str:
    return f"{100 * score['value']:.1f}\n{_ends([100 * end for end in score['ci95']], digits)}"


def _ends(ci95: Sequence[float], digits: int = 1) -> str:
    return f"[{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]"


def _in_words(difference: Results) -> str:
    """`worse`, `better` or `not distinguishable`, of a performance shift less DUET's."""
    if not difference["distinguishable"]:
        return "not distinguishable"
    return "better" if difference["difference"] > 0 else "worse"


def compare_table(results: Results) -> Table:
    """One row per model."""
    table = Table(title=_title(results), title_justify="left", show_lines=True)
    for number, head in enumerate(heads(results)):
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=number > 0, overflow="fold")
    for name in results["models"]:
        table.add_row(*cells(name, results, digits=0))  # whole points: narrower, and no more is known
    return table


def _title(results: Results) -> str:
    return (
        "ROUGE-L recall in points [95 % interval] on the questions that nothing was chosen on, and under each attack, per "
        "question at worst, distinctive recall (seen: the method was trained on other texts of that kind); means and intervals "
        "over questions and training seeds together; "
        f"all start from {results['start']}, {results['train']['epochs']} epochs in batches of {results['train']['batch_size']}"
    )


def sentences(results: Results) -> list[str]:
    """Sentences on which methods can be distinguished from DUET, and which say fewer facts under an attack."""
    groups: dict[str, list[str]] = {}
    for name in results["methods"]:
        if less := results["comparisons"].get(name, {}).get("performance_shift"):
            groups.setdefault(_in_words(less), []).append(row_title(name, results))
    duet = row_title(results["against"], results)
    words = {
        "worse": f"a lower performance shift than {duet}'s",
        "better": f"a higher performance shift than {duet}'s",
        "not distinguishable": f"not distinguishable from {duet} by performance shift",
    }
    shifts = [f"{text}: {', '.join(groups[verdict])}" for verdict, text in words.items() if verdict in groups]
    attacks = [
        f"{title}: at worst fewer facts than from {duet}: {', '.join(fewer)}"
        for title, key in attack_keys(results).items()
        if (fewer := _with_less(key, results))
    ]
    return [*shifts, *attacks]


def _with_less(key: str, results: Results) -> list[str]:
    """The methods of which an attack brings back less than of DUET, distinguishably."""
    unseen = (name for name in results["methods"] if key not in _seen(name, results))
    found = {name: results["comparisons"].get(name, {}).get(key) for name in unseen}
    return [
        row_title(name, results)
        for name, less in found.items()
        if less and less["distinguishable"] and less["difference"] < 0
    ]


def render(results: Results) -> str:
    """The whole page as HTML text, a pure function of compare.json."""
    lead = " ".join(f"{escape(sentence[0].upper() + sentence[1:])}." for sentence in sentences(results))
    body = "".join(
        (
            f'<p class="lead">{lead}</p>',
            _html_table(results),
            compared_section(results) if "chain" in results else "",
            _plot(results),
            _differences(results),
            _grids(results),
            f"<h2>What the numbers mean</h2>{definition_list(results['definitions'])}",
            f"<h2>Provenance</h2><h3>Comparison</h3>{definition_list(results['compare'])}",
            f"<h3>Training</h3>{definition_list(results['train'])}",
            f"<h3>Environment</h3>{definition_list(results['environment'])}",
        )
    )
    meta = f"Run {results['run']}, {results['created']}"
    return page(f"DUET against other methods: forgetting {results['topic']}", meta, body)


def _html_table(results: Results) -> str:
    def shown(text: str, tag: str = 'td class="number"') -> str:
        first, *rest = text.split("\n")
        return f"<{tag}>{escape(first)}<small>{'<br>'.join(map(escape, rest))}</small></{tag.split(maxsplit=1)[0]}>"

    head = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads(results))
    rows = "".join(
        f"<tr>{shown(title, ROW_HEAD)}{''.join(map(shown, rest))}</tr>"
        for title, *rest in (cells(name, results) for name in results["models"])
    )
    return (
        f'<h2>Side by side</h2><div class="scroll"><table><caption>{escape(_title(results))}. Each method has the setting '
        "with the largest performance shift on the other questions, trained with several seeds.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _plot(results: Results) -> str:
    dots, palette = {}, {}
    for name, found in results["trade_off"].items():
        title = row_title(name, results)
        gone, kept = found["forgotten"], found["kept"]
        dots[title] = Dot(gone["value"], kept["value"], tuple(gone["ci95"]), tuple(kept["ci95"]))
        kind = (
            "DUET"
            if name.split(":")[0] == "duet"
            else "other methods"
            if name in results["methods"]
            else "base, teacher, oracle"
        )
        palette[title] = KIND_COLOURS[kind]
    return (
        '<h2>Forgetting against keeping</h2><p class="note">To the right, what is missing to full recall on the sets to be '
        "forgotten; upwards, recall on the sets to be kept, each the mean over its sets. Whiskers are 95 % intervals. The "
        "upper right corner has forgotten all and kept all.</p>"
        + legend(KIND_COLOURS)
        + scatter(dots, palette, AXES, "Forgetting against keeping, by method")
    )


def _differences(results: Results) -> str:
    attacks, duet = attack_keys(results), row_title(results["against"], results)
    keys = [f"{name}.rougeL_recall" for name in results["sets"]] + list(attacks.values())

    def shown(found: Results | None, scale: float) -> str:
        if found is None:
            return '<td class="number">-</td>'
        ci95 = [scale * end for end in found["ci95"]]
        words = "" if found["distinguishable"] else "<br>not distinguishable"
        return f'<td class="number">{scale * found["difference"]:+.1f}<small>{_ends(ci95)}{words}</small></td>'

    head = "".join(
        f'<th class="number" scope="col">{escape(name)}</th>'
        for name in (*results["sets"], *attacks, "performance shift")
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row_title(name, results))}</th>{"".join(shown(of.get(key), 100) for key in keys)}'
        f"{shown(of['performance_shift'], 1)}</tr>"
        for name, of in results["comparisons"].items()
    )
    return (
        f'<h2>Less {duet}, on the same questions</h2><div class="scroll"><table><caption>Each model\'s recall, in points, less '
        f"{duet}'s on the same questions, of attacks per question at worst and in distinctive recall, with a paired 95 % "
        "bootstrap interval over seeds and questions; questions with one answer are drawn together."
        f'</caption><thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _grids(results: Results) -> str:
    heads = ("method", "setting", "validation shift", "steps", "seconds", "")
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in _tried(method['title'], row))}</tr>"
        for method in results["methods"].values()
        for row in method["grid"]
    )
    n = ", ".join(f"{name} {count}" for name, count in results["split"]["validation"].items())
    return (
        '<h2>What was tried</h2><div class="scroll"><table><caption>Performance shift on the validation part '
        f"({escape(n)}), in points.</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _tried(title: str, row: Results) -> list[str]:
    notes = ["chosen"] if row["chosen"] else []
    notes += [f"diverged at step {row['diverged_at']}"] if row["diverged_at"] else []
    shift = f"{row['validation_shift']:+.1f}"
    return [title, row["setting"], shift, str(row["steps"]), f"{row['train_s']:.1f}", "; ".join(notes)]
