"""The gathered head: the numbers and gradients of each model's own forward pass, or the model's own head, and it says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import ARCHITECTURES, noisy, tiny_config, tiny_model
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from duet.stages.models.alignment import AlignedBatch, align
from duet.stages.student import gather
from duet.stages.student.gather import dots_chunked, dots_fused, gathered_logits, largest, logsumexp
from duet.stages.student.head import Head, parts_of, student_at, tail_of
from duet.stages.student.losses import TopK, forward_kl_tail, reverse_kl_tail

V, K = 307, 9  # no other size of these models is 307
CONFIGS = {name: tiny_config(name, V) for name in ARCHITECTURES}


def model_of(name: str = "llama", cls: Any = hf.AutoModelForCausalLM.from_config) -> Any:
    return tiny_model(CONFIGS[name], cls)


def batch_and_ids() -> tuple[AlignedBatch, torch.Tensor]:
    batch = align([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]], pad_id=0)
    return batch, torch.randint(V, (len(batch.position_N), K), generator=torch.Generator().manual_seed(2))


def own(model: Any, batch: AlignedBatch, ids_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the ids, log-sum-exp and top-1 of the model's ordinary forward pass."""
    out = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    logits_NV = out.logits[batch.batch_index_N, batch.position_N].float()
    return logits_NV.gather(1, ids_NK), logits_NV.logsumexp(-1), logits_NV.argmax(-1)


def ours(model: Any, batch: AlignedBatch, ids_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head = Head.of(model)
    torch.manual_seed(3)
    seen = student_at(model, head, batch, ids_NK, want_logsumexp=True, want_top1=True)
    assert seen.logsumexp_N is not None
    assert seen.top1_N is not None
    alone, *nothing = (
        student_at(model.eval(), head, batch, ids_NK) if not model.training else (seen.logits_NK, None, None)
    )
    assert nothing == [None, None]
    assert torch.equal(alone, seen.logits_NK)
    return seen.logits_NK, seen.logsumexp_N, seen.top1_N


def gradients(model: Any, logits_NK: torch.Tensor, logsumexp_N: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of every parameter, for a loss that weighs all of both results differently."""
    model.zero_grad(set_to_none=True)
    weights_NK = torch.linspace(-1, 1, logits_NK.numel()).view(logits_NK.shape)
    loss = (logits_NK * weights_NK).sum() + (logsumexp_N * weights_NK[:, 0]).sum()
    if loss.requires_grad:  # not without adapters
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_like_own(
    model: Any, batch: AlignedBatch | None = None, tolerance: float = 2e-5, gathered: bool = True
) -> None:
    """Values and gradients of all parameters; `tolerance` is relative to the largest entry of each tensor."""
    assert Head.of(model).gathered == gathered, Head.of(model).reason
    full, ids_NK = batch_and_ids()
    if batch is None:
        batch = full
    else:
        ids_NK = torch.randint(V, (len(batch.position_N), K), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    *expected, expected_top1 = own(model, batch, ids_NK)
    expected_gradients = gradients(model, *expected)
    *found, top1 = ours(model, batch, ids_NK)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert_near(one, other, tolerance, "values")
    if tolerance < 1e-3 and not model.training:
        assert torch.equal(top1, expected_top1)
    for name, gradient in gradients(model, *found).items():
        expected_gradient = expected_gradients[name]
        assert (gradient is None) == (expected_gradient is None), name
        if gradient is not None and expected_gradient is not None:
            assert gradient.dtype == expected_gradient.dtype
            assert_near(gradient, expected_gradient, tolerance, name)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    error = (found.detach().double() - expected.detach().double()).abs().max()
    assert error <= tolerance * expected.detach().abs().max() + 1e-7, (name, float(error))


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_gradients_are_those_of_the_models_own_forward_pass(name):
    model = model_of(name)
    assert Head.of(model).reason.startswith(f"{type(model).__name__}: gathered head")
    assert_like_own(model)


def test_a_frozen_head_gets_no_gradient_and_passes_it_on():
    model = model_of("phi")
    model.get_output_embeddings().requires_grad_(False)
    assert_like_own(model)


def test_gradient_checkpointing():
    model = model_of("gemma2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_like_own(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_bfloat16_weights(name):
    # 2^-5: the model's own forward pass rounds its logits, and their gradients, to 8 bits before each operation after the
    # head, we once; what differs is then carried through two layers in bfloat16. Row by row the probe is stricter.
    model = model_of(name).to(torch.bfloat16)
    assert_like_own(model, tolerance=2**-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_autocast_over_float32_weights(name):
    model = model_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_own(model, tolerance=2**-5)  # as above


def test_autocast_over_a_frozen_bfloat16_head():
    model = model_of("llama")
    model.get_output_embeddings().requires_grad_(False).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_own(model, tolerance=2**-5)  # as above


def lora(name: str = "llama", targets: tuple[str, ...] = ("q_proj", "lm_head"), **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=list(targets), **more)
    return noisy(peft.get_peft_model(model_of(name), config).eval())


LORA: dict[str, Callable[[], Any]] = {
    "on the head": lora,
    "on a head with a bias": lambda: lora("phi"),
    "with a bias of its own": lambda: lora("phi", lora_bias=True),
    "under a scale": lambda: lora("granite"),
    "on attention only": lambda: lora(targets=("q_proj", "v_proj")),
    "on attention only, tied": lambda: lora("llama-tied", targets=("q_proj",)),
    "beside a trained head": lambda: lora(targets=("q_proj",), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", LORA)
def test_adapters(name):
    model = LORA[name]()
    assert_like_own(model)


def test_adapters_with_dropout_draw_the_same_masks():
    # Every row of every sequence is supervised, so that the model's own head draws a mask of as many entries.
    batch = align([[5], [6]], [[7, 8, 9], [10, 11, 12]], pad_id=0)
    assert_like_own(lora(lora_dropout=0.5).train(), batch)


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"], "targets": ("q_proj",)}])
def test_adapters_switched_off_and_on(more):
    model = lora(**more)
    batch, ids_NK = batch_and_ids()
    switched_on = own(model, batch, ids_NK)[0]
    with model.disable_adapter():
        assert_like_own(model)
        assert not torch.allclose(own(model, batch, ids_NK)[0], switched_on)
    assert_like_own(model)


def test_merged_adapters():
    model = lora()
    model.merge_adapter()
    assert_like_own(model)


def test_two_active_adapters():
    peft = pytest.importorskip("peft")
    model = lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    assert_like_own(noisy(model))


class Clamped(hf.LlamaForCausalLM):
    """Does to its logits what no config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.clamp(-1, 1)
        return out


class WithoutModule(hf.LlamaForCausalLM):
    """Uses its head's weight without calling it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD = self.model(*args, **kwargs).last_hidden_state
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=nn.functional.linear(hidden_BTD, self.lm_head.weight))


class Unnamed(hf.LlamaForCausalLM):
    def get_output_embeddings(self) -> Any:
        return None


def sequential_head() -> Any:
    model = model_of("llama")
    model.lm_head = nn.Sequential(nn.LayerNorm(32), model.lm_head)
    return model


def changed_scale() -> Any:
    model = model_of("cohere")  # which keeps the scale that it was made with
    model.config.logit_scale = 0.21
    return model


def changed_softcap() -> Any:
    model = model_of("granite")
    model.config.final_logit_softcapping = 400.0  # which Granite does not have
    return model


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "more than a linear layer": (sequential_head, "its output layer is a Sequential"),
    "clamped logits": (lambda: model_of("llama", Clamped), "differs"),
    "head module not called": (lambda: model_of("llama", WithoutModule), "does not go through"),
    "no output layer": (lambda: model_of("llama", Unnamed), "names no output layer"),
    "another scale than the config's": (changed_scale, "differs"),
    "another soft-cap than the config's": (changed_softcap, "differs"),
    "an adapter of another kind": (lambda: lora(use_dora=True), "not a plain LoRA"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_is_not_understood_uses_its_own_head_and_says_why(name):
    make, reason = UNKNOWN[name]
    model = make()
    head = Head.of(model)
    assert not head.gathered
    assert "the model's own head, because" in head.reason
    assert reason in head.reason
    assert_like_own(model, gathered=False)


def test_the_trial_leaves_no_trace():
    model = lora(lora_dropout=0.5, modules_to_save=["embed_tokens"]).train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    state, head = torch.get_rng_state(), model.get_output_embeddings()
    assert Head.of(model).gathered
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(head)
    assert not head._forward_pre_hooks


class WideTensors(TorchDispatchMode):
    """Rows of every tensor with a logit for each entry of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == V:
                self.rows.add(tensor.numel() // V)
        return out


def test_the_vocabulary_is_never_spread_out_and_other_rows_never_reach_the_head():
    batch, ids_NK = batch_and_ids()
    assert len(batch.position_N) < batch.input_ids_BT.numel()
    for model, expected in ((model_of("llama"), set()), (sequential_head(), {len(batch.position_N)})):
        head = Head.of(model)
        with WideTensors() as wide:
            student_at(model, head, batch, ids_NK)[0].sum().backward()
        assert wide.rows - {32} == expected  # 32: the transpose of W


def random_parts(n: int, dtype: torch.dtype, *, bias: bool = False) -> gather.Parts:
    draw = torch.Generator().manual_seed(0)
    shapes = [(n, 16), (V, 16), (n, 3), (V, 3)] + ([(n, 1), (V, 1)] if bias else [])
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, the last one smaller, in every loop over ids or the vocabulary."""
    monkeypatch.setattr(gather, "CHUNK_ENTRIES", 2 * K)
    monkeypatch.setattr(gather, "CHUNK_IDS", 7)
    monkeypatch.setattr(gather, "BLOCK_ENTRIES", 5 * 100)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_against_finite_differences():
    parts = random_parts(5, torch.float64, bias=True)
    ids_NK = torch.randint(20, (5, K), generator=torch.Generator().manual_seed(1))  # each about twice
    tensors = [tensor for part in parts for tensor in part]

    def again(tensors: tuple[torch.Tensor, ...]) -> gather.Parts:
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    assert gradcheck(lambda *t: gathered_logits(again(t), ids_NK), tensors, fast_mode=True)

    def sums(*tensors: torch.Tensor, known: bool) -> torch.Tensor:
        logits_NK = gathered_logits(again(tensors), ids_NK) if known else None
        return logsumexp(again(tensors), lambda z: torch.tanh(z / 5) * 5, ids_NK, logits_NK)

    for known in (False, True):
        assert gradcheck(partial(sums, known=known), tensors, fast_mode=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cap", [40.0, None])
def test_probabilities_under_autocast_are_those_of_one_head(cap):
    """Products in bfloat16 are rounded by up to 2^-9 of a logit of 30, and their sum with them."""
    model = model_of("phi")  # a head with a bias
    model.config.final_logit_softcapping = cap
    head = model.get_output_embeddings()
    hidden_ND = 6 * torch.randn(200, head.in_features, generator=torch.Generator().manual_seed(4))
    parts = [(value.detach(), weight.detach()) for value, weight in parts_of(head, hidden_ND)]
    parts[0] = (parts[0][0], parts[0][1] * 12 / parts[0][1].std() / 6 / head.in_features**0.5)
    tail = tail_of(model.config)
    exact_NV = tail(torch.stack([value.double() @ weight.double().T for value, weight in parts]).sum(0))
    assert exact_NV.max() > 30
    ids_NK = exact_NV.topk(K).indices
    ids_NK[:, -1] = ids_NK[:, 0]  # the answer may be one of the others
    with torch.autocast("cpu", torch.bfloat16):
        logits_NK = gathered_logits(parts, ids_NK)
        student = TopK(tail(logits_NK)[:, :-1], logsumexp(parts, tail, ids_NK, logits_NK))
    teacher = TopK(exact_NV.gather(1, ids_NK)[:, :-1], exact_NV.logsumexp(-1))
    for loss in (forward_kl_tail, reverse_kl_tail):
        assert loss(student, teacher).abs().max() < 1e-4  # 0, but for rounding; else up to 0.1


@pytest.mark.usefixtures("small_blocks")
def test_blocks_against_the_whole_vocabulary():
    parts = random_parts(5, torch.float32)
    logits_NV = sum(values @ weight.T for values, weight in parts)
    assert isinstance(logits_NV, torch.Tensor)
    torch.testing.assert_close(logsumexp(parts, lambda z: z), logits_NV.logsumexp(-1))
    best_N, ids_N = largest(parts)
    torch.testing.assert_close(best_N, logits_NV.amax(-1))
    assert torch.equal(ids_N, logits_NV.argmax(-1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_kernel_and_its_stand_in_agree(dtype, unit):
    (hidden_ND, weight_VD), *_ = random_parts(5, dtype)
    ids_NK = torch.randint(V, (5, K), generator=torch.Generator().manual_seed(1))
    exact = torch.einsum("nd,nkd->nk", hidden_ND.double(), weight_VD.double()[ids_NK])
    sizes = torch.einsum("nd,nkd->nk", hidden_ND.double().abs(), weight_VD.double()[ids_NK].abs())
    with torch.no_grad():
        for found in (dots_fused(hidden_ND, weight_VD, ids_NK), dots_chunked(hidden_ND, weight_VD, ids_NK)):
            assert found.dtype == dtype
            # sums in float32 or wider: one rounding of the result, and far less of the terms
            assert ((found.double() - exact).abs() <= unit * exact.abs() + min(unit, 1e-6) * sizes).all()


def test_a_stand_in_does_without_the_private_op(monkeypatch):
    monkeypatch.setattr(gather, "_FUSED", None)
    assert_like_own(model_of("llama"))


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_ids_that_come_again_and_again_lose_nothing(hidden_dtype, weight_dtype):
    n, k, width = 256, 64, 16
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, width, generator=draw).bfloat16().to(hidden_dtype).requires_grad_()
    weight_VD = torch.randn(V, width, generator=draw).to(weight_dtype).requires_grad_()
    ids_NK = torch.full((n, k), 3)
    grad_NK = torch.rand(n, k, generator=draw).bfloat16().float()
    gathered_logits([(hidden_ND, weight_VD)], ids_NK).backward(grad_NK)
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    assert (hidden_ND.grad.dtype, weight_VD.grad.dtype) == (hidden_dtype, weight_dtype)
    exact_D = (grad_NK.double().sum(1) @ hidden_ND.detach().double()).detach()
    size_D = grad_NK.double().sum(1) @ hidden_ND.detach().double().abs()
    unit = 2**-8 if weight_dtype is torch.bfloat16 else 1e-6  # one rounding of the sum of 16,384 terms
    assert ((weight_VD.grad[3].double() - exact_D).abs() <= unit * exact_D.abs() + 1e-6 * size_D).all()
    assert weight_VD.grad.count_nonzero() == width
    exact_ND = grad_NK.double().sum(1, keepdim=True) * weight_VD.detach()[3].double()
    coarse = torch.bfloat16 in (hidden_dtype, weight_dtype)
    assert ((hidden_ND.grad.double() - exact_ND).abs() <= (2**-8 if coarse else 1e-6) * exact_ND.abs()).all()
