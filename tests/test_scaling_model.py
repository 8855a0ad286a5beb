"""The model on paper: its counts are those of real models, its page is what it prints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from omniopd.methods.omniopd import OmniOPDConfig
from omniopd.store import Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "bench"))
        yield SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("costs", "step_inputs", "step_model", "scaling", "gpu")}
        )


@pytest.fixture
def plan(bench: SimpleNamespace) -> Any:
    """A student of 8B on H100s, with round numbers for what was measured."""
    inputs, costs = bench.step_inputs, bench.costs
    load = inputs.Load(inputs.Measured(reply_share=0.5, branch_share=0.25, reply_bytes=500.0))
    return bench.step_model.Plan(costs.QWEN3_8B, costs.QWEN3_32B, inputs.H100, load)


def test_shapes_have_the_published_numbers_of_parameters(bench: SimpleNamespace) -> None:
    published = {"QWEN3_06B": 0.6, "QWEN3_17B": 1.7, "QWEN3_8B": 8.2, "QWEN3_32B": 32.8, "LLAMA_70B": 70.6}
    for name, billions in published.items():
        assert getattr(bench.costs, name).parameters == pytest.approx(billions * 1e9, rel=0.02), name
    assert bench.costs.QWEN3_8B.body == pytest.approx(6.95e9, rel=0.001)  # "non-embedding" in its model card


def tiny_shape(bench: SimpleNamespace, tied: bool) -> tuple[Any, Qwen3Config]:
    """A shape in the model of costs, and the same as a real model's config."""
    shape = bench.costs.Transformer("tiny", 2, 64, 4, 2, 96, 500, tied, head_dim=16)
    config = Qwen3Config(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    return shape, config


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_flops_and_past_are_those_of_a_real_model(bench: SimpleNamespace, tied: bool) -> None:
    shape, config = tiny_shape(bench, tied)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters + norms
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        past = model(input_ids=torch.zeros(3, 40, dtype=torch.long), logits_to_keep=8, use_cache=True).past_key_values
    assert counter.get_total_flops() == shape.forward_flops(tokens=3 * 40, context=40, predicted=3 * 8)
    layers = past.layers
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == shape.kv_bytes(3 * 40, width=4)


def test_what_a_token_looks_at_is_the_mean_over_the_response(bench: SimpleNamespace) -> None:
    seen = [7 + place for place in range(1, 6)]  # the token itself, those before it, and the prompt
    assert bench.costs.response_context(7, 5) == sum(seen) / 5


def test_an_update_of_ours_makes_no_more_passes_than_are_counted(bench: SimpleNamespace, tmp_path: Path) -> None:
    from omniopd.objective import Objective
    from omniopd.types import Message, Prompt, Rollout, Signal
    from students.policy import Policy, StudentSettings
    from students.trainer import OptimizerSettings, Trainer

    shape, setting = bench.gpu.SHAPES["tiny"][0], bench.gpu.Setting()
    folder = str(bench.gpu.save_model(shape, tmp_path / "student", setting))
    policy = Policy(StudentSettings(path=folder, gradient_checkpointing=True, attention="eager"))
    rows, prompt, response = 4, 6, 5
    one = Rollout(
        Prompt("", (Message("user", ""),)),
        prompt_ids=(7,) * prompt,
        ids=(8,) * response,
        logprobs=(-1.0,) * response,
        entropy=(1.0,) * response,
        ends=tuple(range(1, response + 1)),
        text="x" * response,
        finish="length",
    )
    half = torch.arange(response) < 2  # of the tokens have a value, the others the anchor
    signal = Signal((half.float(),) * rows, (half,) * rows)
    trainer = Trainer(policy, OptimizerSettings(), Objective())
    with FlopCounterMode(display=False) as counter:
        trainer.accumulate([one] * rows, signal)
    length = prompt + response
    body = shape.forward_flops(rows * length, length, 0)
    head = shape.forward_flops(0, 0, rows * response)
    # Less by what checkpointing leaves out of each layer, and by the products that the counter does not see: under one pass.
    assert 0.85 < counter.get_total_flops() / (5 * body + 4 * head) <= 1


def test_the_updates_time_is_that_of_its_passes(plan: Any) -> None:
    for each, body_passes, head_passes in ((plan, 5, 4), (replace(plan, lora_rank=16), 4, 3)):
        load, shape = each.load, each.student
        predicted = load.prompts * load.response_tokens + load.branch_tokens
        head = shape.forward_flops(0, 0, predicted)
        body = load.forward_flops(shape, load.branch_tokens) - head
        flops = each.multiplying * each.gpus * each.device.rate * each.share.update
        assert flops == pytest.approx(body_passes * body + head_passes * head)


def test_memory_adds_up_to_the_bytes_of_a_parameter(bench: SimpleNamespace, plan: Any) -> None:
    parts = plan.memory(4)
    kept = sum(parts[name] for name in ("weights", "gradients", "AdamW", "reference"))
    assert kept == pytest.approx((4 + 4 + 8 + 4) * plan.student.parameters / 4)
    adapters = replace(plan, lora_rank=16)
    frozen = adapters.memory(1)
    assert frozen["weights"] == 2 * plan.student.parameters + 4 * adapters.trained
    assert (frozen["gradients"], frozen["AdamW"], frozen["reference"]) == (
        4 * adapters.trained,
        8 * adapters.trained,
        0,
    )
    for each in (plan, adapters):
        assert sum(each.memory(each.gpus).values()) <= each.usable
        assert each.gpus == 1 or sum(each.memory(each.gpus // 2).values()) > each.usable


def test_as_the_code_is_a_student_must_be_whole_on_a_gpu_at_times(bench: SimpleNamespace, plan: Any) -> None:
    gpus, whole = plan.gpus_today, 4 * plan.student.parameters
    states = 20 * plan.student.parameters
    assert states / gpus + whole <= plan.usable < states / (gpus // 2) + whole
    adapters = replace(plan, lora_rank=16)
    assert adapters.gpus_today == 1
    large = replace(plan, student=bench.costs.LLAMA_70B)
    assert large.gpus_today is None and replace(large, lora_rank=16).gpus_today is None
    small = replace(plan, student=bench.costs.QWEN3_06B)
    assert small.gpus_today == small.gpus == 1


def test_adapters_have_the_size_of_pefts(bench: SimpleNamespace) -> None:
    from peft import LoraConfig, get_peft_model

    shape, config = tiny_shape(bench, True)
    adapted = get_peft_model(Qwen3ForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    load = bench.step_inputs.Load(bench.step_inputs.Measured(1, 1, 1))
    plan = bench.step_model.Plan(shape, shape, bench.step_inputs.H100, load, lora_rank=8)
    assert plan.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_decoding_is_bound_by_bandwidth_until_rows_are_many(bench: SimpleNamespace, plan: Any) -> None:
    few = replace(plan, load=replace(plan.load, prompts=4, prompt_tokens=1))
    server = few.serving(few.student, bench.step_model.ROLLOUT_ROOM)
    assert few.writers // server == few.load.prompts == 4  # a row on each server
    context = bench.costs.response_context(1, 1024)
    reads = few.student.decode_bytes(1, context) / (server * few.device.bandwidth * few.share.decode)
    assert few.rollout == pytest.approx(1024 * reads, rel=1e-3)
    fast = replace(few.device, bandwidth=1e18)
    multiplies = few.student.forward_flops(1, context, 1) / (server * fast.rate * few.share.forward)
    assert replace(few, device=fast).rollout == pytest.approx(1024 * multiplies, rel=1e-2)


def test_rows_that_do_not_fit_wait_for_a_wave_of_their_own(plan: Any) -> None:
    small = replace(plan, load=replace(plan.load, prompts=plan.room * plan.writers))
    large = replace(plan, load=replace(plan.load, prompts=plan.room * plan.writers * 2))
    assert large.rollout == pytest.approx(2 * small.rollout, rel=1e-6)


def test_a_teacher_is_as_slow_as_its_latency_or_its_limit(plan: Any) -> None:
    patient = replace(plan, load=replace(plan.load, tokens_per_minute=1e12))
    assert patient.asking == 256 * 10 / 256 * 2.0
    limited = replace(plan, load=replace(plan.load, concurrency=10**6))
    assert limited.asking == pytest.approx(sum(plan.load.teacher_tokens) / 10e6 * 60)


def test_evidence_and_money_follow_the_methods_settings(plan: Any) -> None:
    method = OmniOPDConfig()
    sent, brought = plan.load.teacher_tokens
    assert sent == 256 * method.chunks * (256 + 512)
    assert brought == 256 * method.chunks * method.continuations * method.reply_tokens * 0.5
    assert plan.load.branch_tokens == brought / 4
    assert plan.load.dollars((1.0, 2.0)) == pytest.approx((sent + 2 * brought) / 1e6)


def test_lag_hides_the_teacher_and_nothing_else(plan: Any) -> None:
    device = plan.rollout + plan.checking + plan.update + plan.push
    assert plan.step(1000.0, lagging=True) == 1000.0
    assert plan.step(1000.0, lagging=False) == pytest.approx(1000.0 + plan.update + plan.push)
    assert plan.step(0.5, lagging=True) == pytest.approx(device)
    assert plan.step(0.5, lagging=False) == pytest.approx(device + 0.5)


def test_what_is_pushed_is_the_whole_student(plan: Any) -> None:
    assert plan.push == 2 * 4 * plan.student.parameters / plan.load.storage
    assert replace(plan, lora_rank=16).push == plan.push / 2


def test_gathers_bound_the_update_once_gpus_are_many(plan: Any) -> None:
    assert replace(plan, lora_rank=16).gathering == 0.0  # one GPU
    slow = replace(plan, device=replace(plan.device, link=1e6))
    assert slow.update == slow.gathering > plan.update == plan.multiplying
    gpus, load = plan.gpus, plan.load
    batches = -(-(256 * 1280 + load.branch_tokens) // (gpus * load.micro_batch_tokens))
    whole = (3 * 4 + 4) * plan.student.parameters * (gpus - 1) / gpus
    assert plan.gathering == pytest.approx(batches * whole / (plan.device.link * plan.share.link))


def test_inputs_are_read_from_a_runs_folder(bench: SimpleNamespace, tmp_path: Path) -> None:
    method = {"name": "omniopd", "chunks": 3, "chunk_tokens": 6, "continuations": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": method}), encoding="utf-8")
    steps = [{"queries": 10, "teacher_completion_tokens": 390, "branch_tokens": 78.0}] * 2
    rows = [{"step": 0, "eval": {}}, *steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Store(tmp_path / "answers.sqlite").close()
    found = bench.scaling.measure(tmp_path)
    assert found.reply_share == pytest.approx(780 / (2 * 10 * 5 * 13))
    assert found.branch_share == pytest.approx(0.2)
    assert 10 < found.reply_bytes < 10_000


def test_the_page_holds_what_the_script_prints(bench: SimpleNamespace) -> None:
    page = bench.scaling.PAGE.read_text(encoding="utf-8")
    made = bench.scaling.tables(bench.scaling.load_measured())
    assert bench.scaling.written(page, made) == page, "run: python examples/bench/scaling.py --write"
    assert set(made) == {"memory", "time", "money"}
    with pytest.raises(ValueError, match="no place for the table 'extra'"):
        bench.scaling.written(page, {"extra": ""})
