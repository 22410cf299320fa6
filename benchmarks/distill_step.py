# SPDX-License-Identifier: Apache-2.0
"""One distillation step against its matrix products alone, the naive loss, and TRL's GKD loss where it is installed.

The limit is the time of the step's matrix products by themselves: every linear map of teacher (once) and student (forward,
and twice backward), the adapter's included, and the products of attention. All ways share models, text and optimiser-free
step; each repeat measures every way in turn. Extra memory is what a step allocates above its models and gradients.

python benchmarks/distill_step.py [--vocabulary 8192] [--rows 8] [--length 256] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, PreTrainedModel, Qwen2MoeConfig
from transformers.pytorch_utils import Conv1D

from deepfusion.devices.features import Reading, forward, read
from deepfusion.devices.models import from_config
from deepfusion.losses import TeacherScores, next_token_losses
from deepfusion.moe import families
from deepfusion.moe.single import compute_as_mlp
from deepfusion.stages.distill import DistillOptions, Vaa
from deepfusion.stages.distill.objective import Teacher, domain_losses
from deepfusion.types import Batch

WIDTH, DEPTH, HEADS = 256, 4, 4


def make_models(vocabulary: int, length: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A single-expert Qwen2-MoE student, and a GPT-2 teacher of the same width and depth."""
    family = families["qwen2_moe"]
    target = Qwen2MoeConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, moe_intermediate_size=2 * WIDTH, shared_expert_intermediate_size=2 * WIDTH,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=length,
    )  # fmt: skip
    student = from_config(family.student_config(family.ready_target(target)), seed=0)
    compute_as_mlp(student)
    teacher = from_config(
        GPT2Config(vocab_size=vocabulary, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS, n_positions=length), seed=1
    )
    return student.train(), teacher.eval().requires_grad_(False)


def products(run: Callable[[], Any], modules: list[nn.Module]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the matrix products of one forward pass: linear maps by hooks, the two of attention by its inputs."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def linear(module: Any, inputs: Any, _output: Any) -> None:
        tokens = inputs[0].numel() // inputs[0].shape[-1]
        weight = module.weight.shape
        inner, outer = (weight[0], weight[1]) if isinstance(module, Conv1D) else (weight[1], weight[0])
        found.append(((tokens, inner), (inner, outer)))

    handles = [
        m.register_forward_hook(linear)
        for model in modules
        for m in model.modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def limit_of(shapes: list[tuple[tuple[int, ...], tuple[int, ...]]], times: int) -> Callable[[], None]:
    """What multiplies matrices of these shapes, `times` over, and does nothing else."""
    pairs = [(torch.randn(left), torch.randn(right)) for left, right in shapes]
    outs = [torch.empty(left[0], right[1]) for left, right in shapes]

    def run() -> None:
        for _ in range(times):
            for (left, right), out in zip(pairs, outs, strict=True):
                torch.mm(left, right, out=out)

    return run


def attention_of(model: PreTrainedModel, batch: Batch, times: int) -> Callable[[], None]:
    """The two products of attention in every layer, `times` over."""
    rows, length = batch.input_ids_BT.shape
    size = WIDTH // HEADS
    query, score = torch.randn(rows * HEADS, length, size), torch.randn(rows * HEADS, length, length)

    def run() -> None:
        for _ in range(times * DEPTH):
            torch.bmm(query, query.mT)
            torch.bmm(score, query)

    return run


def extra_memory(step: Callable[[], None]) -> float:
    """Largest sum of what was allocated and not yet freed within one step, in MiB; gradients are there before it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    """Print one line of JSON for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 8192), ("rows", 8), ("length", 256), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    student, teacher = make_models(options.vocabulary, options.length)
    ids_BT = torch.randint(0, options.vocabulary, (options.rows, options.length))
    every_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    batch = Batch(ids_BT, every_BT, every_BT)
    adapter = Vaa().attach(student.config, teacher.config, sequence_length=options.length, seed=0)
    plain, matched = Teacher(teacher, 1.0, None), Teacher(teacher, 1.0, adapter)

    def heard(of: Teacher) -> Reading:
        with torch.no_grad():
            return read(teacher, batch, taps=of.adapter.teacher_taps if of.adapter else ())

    def ours(of: Teacher, trust: Any) -> None:
        settings = DistillOptions(trust=trust, alpha=1.0 if of.adapter else 0.0)
        (losses,) = domain_losses(student, [[of]], [[heard(of)]], [batch], settings)
        losses["loss"].backward()

    def cross_entropy_only() -> None:
        next_token_losses(read(student, batch).scores, [], batch, 1.0)[0].backward()

    def fused_loss_only() -> None:
        predictions = [TeacherScores(heard(plain).scores, 1.0, batch.valid_BT)]
        next_token_losses(read(student, batch).scores, predictions, batch, 1.0)[0].backward()

    def whole_teacher() -> torch.Tensor:
        with torch.no_grad():
            return forward(teacher, batch).logits_BTV

    def naive() -> None:
        teacher_BTV, student_BTV = whole_teacher(), forward(student, batch).logits_BTV
        ce = nn.functional.cross_entropy(student_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        target_RV, guess_RV = teacher_BTV.flatten(0, 1), student_BTV.flatten(0, 1)
        kl = kl_div(log_softmax(guess_RV, -1), log_softmax(target_RV, -1), log_target=True, reduction="batchmean")
        (ce + kl).backward()

    of_student = products(lambda: forward(student, batch), [student])
    of_teacher = products(whole_teacher, [teacher])
    hidden = forward(student, batch, taps=adapter.student_taps).taps
    target = heard(matched).taps
    of_adapter = products(lambda: adapter(hidden, target, every_BT, every_BT), [adapter])
    # the MLP of the expert is not a module of linear maps: gate and up, then down
    tokens = options.rows * options.length
    expert = [((tokens, WIDTH), (WIDTH, 4 * WIDTH)), ((tokens, 2 * WIDTH), (2 * WIDTH, WIDTH))] * DEPTH
    parts = [limit_of(of_student + expert, 3), attention_of(student, batch, 3), limit_of(of_teacher, 1)]
    parts += [attention_of(teacher, batch, 1)]

    def limit() -> None:
        for part in parts:
            part()

    adapters_limit = limit_of(of_adapter, 3)

    def limit_with_features() -> None:
        limit()
        adapters_limit()

    ways: dict[str, tuple[Callable[[], None], str]] = {
        "limit: CE + KL": (limit, "limit: CE + KL"),
        "limit: CE + KL + VAA": (limit_with_features, "limit: CE + KL + VAA"),
        "student alone, CE": (cross_entropy_only, "limit: CE + KL"),
        "naive CE + KL": (naive, "limit: CE + KL"),
        "ours: CE + KL": (fused_loss_only, "limit: CE + KL"),
        "ours: CE + KL, best teacher": (lambda: ours(plain, "best"), "limit: CE + KL"),
        "ours: CE + KL + VAA": (lambda: ours(matched, "all"), "limit: CE + KL + VAA"),
    }
    try:
        from trl.experimental.gkd import GKDTrainer  # where installed: pip install trl
    except ImportError:
        print(json.dumps({"note": "trl is not installed: GKD left out (pip install trl)"}))
    else:

        def gkd() -> None:
            loss = GKDTrainer.generalized_jsd_loss(forward(student, batch).logits_BTV, whole_teacher(), beta=0.0)
            loss.backward()

        ways["TRL GKD, beta 0 (no CE)"] = (gkd, "limit: CE + KL")
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):  # the first is the warm-up
        for name, (step, _) in ways.items():
            began = time.perf_counter()
            step()
            if repeat:
                taken[name].append(time.perf_counter() - began)
            student.zero_grad()  # as training does
            adapter.zero_grad()
    for name, (step, against) in ways.items():
        # repeat by repeat, so that the machine's moods meet both sides alike
        ratios = sorted(mine / bound for mine, bound in zip(taken[name], taken[against], strict=True))
        print(json.dumps({
            "way": name, "vocabulary": options.vocabulary,
            "tokens_per_second": round(tokens / statistics.median(taken[name])),
            "over_limit": round(statistics.median(ratios), 2), "range": [round(ratios[0], 2), round(ratios[-1], 2)],
            "extra_mib": round(extra_memory(step)),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
