"""`mhf plan` against real models and real steps: parameters, FLOPs, saved activations, sharding, and the command."""

import math
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhf_lightning.cli import main as mhf
from mhf_lightning.data.prepare import prepare
from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.plan.cli import main, make_plan, parse
from mhf_lightning.plan.cuda import CompiledBlocks, cuda_kernels
from mhf_lightning.plan.flops import days, flops_per_token
from mhf_lightning.plan.memory import Step, trace
from mhf_lightning.plan.tracker import ALLOCATION, LiveMemory

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml"), "--data.path=none", "--context_length=64", "--gpu=h100"]
VARIANTS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
FFN = {
    "swiglu": FFNConfig("swiglu", d_ff=96),
    "flash_mhf": FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=32),
    "recomputing": FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=32, recompute_queries=True),
    "mh_ffn": FFNConfig("mh_ffn", num_heads=4, d_ff=48),
}


def config(ffn: str = "flash_mhf", **more) -> DecoderConfig:
    return DecoderConfig(**{"vocab_size": 320, "d_model": 64, "num_layers": 3, "ffn": FFN[ffn], **more})


def model_file(name: str) -> list[str]:
    return ["--config", str(CONFIGS / "model" / f"{name}.yaml")]


def planned(*args: str):
    cli = parse([*QUICKSTART, *args])
    return make_plan(cli.config, cli.model, cli.datamodule)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_flops_are_those_of_a_real_step(name):
    plan = planned(*model_file(name), "--gpus=1")
    decoder = Decoder(plan.step.decoder)
    parameters = list(decoder.parameters())
    assert plan.parameters == sum(p.numel() for p in parameters)
    assert plan.memory.at_peak["weights"] == sum(4 * -(-p.numel() // 128) * 128 for p in parameters)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.zeros(2, 64, dtype=torch.int64)).sum().backward()
    assert plan.flops_per_token * 2 * 64 == counter.get_total_flops()


def test_flops_of_swiglu_by_hand():
    c = config("swiglu")
    matrices = c.num_layers * (4 * 64 * 64 + 3 * 64 * 96) + 320 * 64
    assert flops_per_token(c, 32) == 6 * matrices + c.num_layers * 12 * 64 * 32


def saved_bytes(decoder: Decoder, tokens: torch.Tensor, autocast: bool) -> int:
    """Bytes of all storages that a real forward saves, without parameters, and of the logits."""
    known = {p.untyped_storage().data_ptr() for p in (*decoder.parameters(), tokens)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = forward(decoder, tokens, autocast)
    storages[logits.untyped_storage().data_ptr()] = logits.untyped_storage()
    return sum(-(-storage.nbytes() // ALLOCATION) * ALLOCATION for storage in storages.values())


def forward(decoder: Decoder, tokens: torch.Tensor, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        return decoder(tokens)


CASES = [(ffn, compiled) for ffn in ("swiglu", "flash_mhf", "mh_ffn") for compiled in (False, True)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("ffn", "compiled"), [*CASES, ("recomputing", True)])
def test_activations_are_those_that_a_real_forward_saves(ffn, autocast, compiled):
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    real = Decoder(config(ffn))
    if compiled:  # Inductor's decompositions and partitioner, without its code generation
        torch.compiler.reset()
        for block in real.blocks:
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        saved_bytes(real, tokens, autocast)
        with mock.patch.object(real.final_norm, "forward", partial(cuda_norm, real.final_norm)):
            expected = saved_bytes(real, tokens, autocast)
    else:
        with cuda_kernels():
            expected = saved_bytes(real, tokens, autocast)

    with torch.device("meta"):
        decoder = Decoder(config(ffn))
    memory = LiveMemory(vocab_size=320, workspace=0, scratch={})
    with cuda_kernels(), FakeTensorMode(allow_non_fake_inputs=True), memory:
        decoder.to_empty(device="cpu")
        decoder.head.weight = decoder.embedding.weight
        memory.tag(decoder.parameters(), "weights")
        tokens = torch.zeros(4, 128, dtype=torch.int64)
        if compiled:
            blocks = CompiledBlocks(memory)
            for block in decoder.blocks:
                blocks.install(block)
            forward(decoder, tokens, autocast)
            memory.forget("activations", "weight copies", "logits")
        memory.ignore([tokens])
        before = sum(memory.now.values())
        logits = forward(decoder, tokens, autocast)
        live = sum(memory.now.values()) - before
        del logits
    assert live == pytest.approx(expected, rel=0.01 if compiled else 0, abs=0)


def cuda_norm(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    with cuda_kernels():
        return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def test_rms_norm_saves_its_input_and_a_number_a_row_as_on_cuda():
    x, weight = torch.empty(8, 512, requires_grad=True), torch.ones(512, requires_grad=True)
    saved = []
    original = F.rms_norm
    with cuda_kernels(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.rms_norm(x, (512,), weight)
    assert [tuple(t.shape) for t in saved] == [(8, 512), (512,), (8, 1)]
    assert y.shape == x.shape
    assert F.rms_norm is original


STEP = Step(config(), micro_batch_size=4, context_length=128)


def step(**changes) -> LiveMemory:
    return trace(Step(**{**vars(STEP), **changes}))


def test_parts_at_the_peak_sum_up_and_nothing_outlives_a_step():
    memory = step()
    parameters = sum(p.numel() for p in Decoder(config()).parameters())
    assert sum(memory.at_peak.values()) == memory.peak
    assert memory.now["optimiser"] >= 8 * parameters
    assert memory.now["activations"] == memory.now["logits"] == memory.now["weight copies"] == 0


def test_ddp_keeps_gradients_in_buckets():
    alone, ddp = step(), step(strategy="ddp", data_parallel=2)
    assert alone.at_peak["gradients"] < ddp.at_peak["gradients"] == ddp.now["gradients"]


def test_ddp_accumulates_gradients_beside_its_buckets():
    once, twice = step(strategy="ddp", data_parallel=2), step(strategy="ddp", data_parallel=2, accumulate=2)
    assert twice.at_peak["gradients"] == 2 * once.at_peak["gradients"]
    assert twice.now["gradients"] == once.now["gradients"]


@pytest.mark.parametrize("shards", [{"data_parallel": 4}, {"data_parallel": 2, "tensor_parallel": 2}])
def test_fsdp2_divides_what_the_optimiser_owns(shards):
    alone, sharded = step(), step(strategy="fsdp2", **shards)
    for part in ("weights", "gradients", "optimiser"):
        # Embedding, head, norms and padding are split over data-parallel ranks only, allocations are rounded.
        assert alone.largest[part] / 4 <= sharded.largest[part] < alone.largest[part] / 2
    for memory in (alone, sharded):
        assert all(size <= memory.largest[part] for part, size in memory.at_peak.items())
    assert not dist.is_initialized()


def test_fsdp2_on_ranks_that_divide_no_dimension_counts_the_fullest_rank_with_its_padding():
    """7 ranks: a weight of 4 heads becomes 7 shards of one head, of which rank 0 always has one."""
    parameters = list(Decoder(config()).parameters())
    shards = [4 * math.ceil(len(p) / 7) * p[0].numel() for p in parameters]
    memory = step(strategy="fsdp2", data_parallel=7)
    assert memory.largest["weights"] == sum(math.ceil(size / ALLOCATION) * ALLOCATION for size in shards)


def test_fsdp2_accumulates_whole_gradients():
    once, twice = (step(strategy="fsdp2", data_parallel=8, accumulate=n) for n in (1, 2))
    parameters = sum(p.numel() for p in Decoder(config()).parameters())
    assert twice.at_peak["gradients"] - once.at_peak["gradients"] >= 4 * parameters * 0.8


def test_zero_shards_the_optimiser_and_with_stage_3_the_weights():
    sizes = {"data_parallel": 8, "zero_bucket": 1000, "zero_live": 0}
    two, three = (step(strategy=name, **sizes) for name in ("zero2", "zero3"))
    parameters = sum(p.numel() for p in Decoder(config()).parameters())
    assert 12 * parameters / 8 <= two.now["optimiser"] < 12 * parameters / 8 + 4 * ALLOCATION
    assert two.now["weights"] >= 2 * parameters
    assert three.now["weights"] < 2 * parameters / 8 + ALLOCATION


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_checkpointing_lowers_the_peak(strategy):
    modes = ("full", "ffn", "selective", "none")
    full, ffn, selective, none = (step(strategy=strategy, activation_checkpointing=mode).peak for mode in modes)
    assert full < ffn < selective < none
    some = step(strategy=strategy, activation_checkpointing="selective", fully_checkpointed_blocks=1).peak
    assert full <= some < selective


@pytest.mark.parametrize("strategy", [{}, {"strategy": "fsdp2", "data_parallel": 2, "tensor_parallel": 2}])
def test_compiled_blocks_keep_less(strategy):
    compiled = step(compile_blocks=True, **strategy).peak
    assert compiled < step(**strategy).peak
    if not strategy:
        assert step(compile_blocks=True, fully_checkpointed_blocks=1).peak < compiled


def test_document_masks_cost_their_length_squared():
    more = step(document_masking=True).peak - step().peak
    assert more >= 4 * 128 * 128  # one byte each, and what attention makes of it


def test_days():
    assert days(tokens=100e9, flops=1e10, gpus=10, peak_flops=1e15, mfu=0.5) == pytest.approx(2.3148, abs=1e-4)


def test_512_ranks_in_a_minute(capsys):
    started = time.process_time()  # of this process, whatever else runs
    args = [*QUICKSTART, "--config", str(CONFIGS / "trainer" / "fsdp2_tp.yaml"), *model_file("flash_mhf")]
    assert main([*args, "--gpus=512"]) == 0
    assert time.process_time() - started < 60
    printed = capsys.readouterr().out
    assert "512 x h100 (256 data-parallel x 2 tensor-parallel)" in printed
    assert "fits: " in printed
    assert not dist.is_initialized()


@pytest.mark.parametrize("model", VARIANTS)
@pytest.mark.parametrize("trainer", sorted(path.stem for path in (CONFIGS / "trainer").glob("*.yaml")))
def test_every_trainer_config_can_be_planned_with_every_model_config(trainer, model):
    files = [*model_file(model), "--config", str(CONFIGS / "trainer" / f"{trainer}.yaml")]
    plan = planned(*files, "--model.decoder.num_layers=1", "--gpus=8")
    ranks = plan.step.data_parallel * plan.step.tensor_parallel
    assert ranks == 8
    assert plan.tokens_per_step == 8 * 64 * plan.step.data_parallel
    assert plan.tokens == 300 * plan.tokens_per_step


def test_a_run_that_does_not_fit_exits_with_1_and_says_what_to_change(capsys):
    large = ["--config", str(CONFIGS / "paper" / "1.3b" / "swiglu.yaml"), "--context_length=2048"]
    assert main([*QUICKSTART, *large, "--gpus=1", "--gpu=l4"]) == 1
    error = capsys.readouterr().err
    assert "does not fit: the peak is" in error
    assert "data.micro_batch_size" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu=h9000"], "--gpu is 'h9000'; known are a100-40gb, a100, h100"),
        (["--gpus=0"], "--gpus is 0; it must be at least 1"),
        (["--tokens=-5"], "--tokens is -5; it must be at least 1"),
        (["--tokens=0"], "--tokens is 0; it must be at least 1"),
        (["--trainer.max_steps=-1"], "trainer.max_steps is -1; it must be at least 1"),
        (["--context_length=-5"], "--context_length is -5; it must be at least 1"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0; it must be at least 1"),
        (
            ["--gpus=2", "--config", str(CONFIGS / "trainer/deepspeed_zero3.yaml"), "--model.compile_blocks=true"],
            "model.compile_blocks does not work with ZeRO-3, whose hooks break the graph; turn it off",
        ),
        (
            [
                *("--gpus=2", "--config", str(CONFIGS / "trainer/fsdp2_tp.yaml")),
                *("--model.compile_blocks=true", "--model.activation_checkpointing=full"),
            ],
            "model.compile_blocks with tensor parallelism does not work with blocks that do not keep attention's",
        ),
        (["--trainer.devices=auto"], "trainer.devices is auto, which is no number of GPUs; give --gpus"),
        (["--mfu=1.5"], "--mfu is 1.5; it must be above 0 and at most 1"),
        (["--context_length=null"], "there is no dataset at data.path none to take it from: give --context_length"),
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed; mhf plan knows bf16-mixed"),
        (["--trainer.strategy=fsdp"], "trainer.strategy is fsdp; mhf plan knows auto, ddp"),
        (
            ["--gpus=9", "--config", str(CONFIGS / "trainer" / "fsdp2_tp.yaml")],
            "tensor_parallel_size is 2; it must divide the number of GPUs, which is 9",
        ),
        (
            ["--gpus=8", "--config", str(CONFIGS / "trainer" / "fsdp2_tp.yaml"), "--model.decoder.ffn.d_ff=937"],
            "tensor_parallel_size is 2; it must divide ffn.d_ff 937",
        ),
    ],
)
def test_wrong_options_are_refused(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*QUICKSTART, *model_file("swiglu"), *args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not dist.is_initialized()


def test_the_config_of_a_run_can_be_planned_and_length_comes_from_the_data(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"a few words of text number {number}, " * 50)
    data = tmp_path / "data"
    prepare([str(tmp_path / "*.txt")], str(data), context_length=32, vocab_size=300, num_workers=1)
    fit = ["--config", str(CONFIGS / "quickstart.yaml"), *model_file("flash_mhf"), f"--data.path={data}"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        mhf(["fit", *fit, "--print_config"])
    written = tmp_path / "config.yaml"
    written.write_text(capsys.readouterr().out)
    cli = parse(["--config", str(written), "--gpu=h100"])
    plan = make_plan(cli.config, cli.model, cli.datamodule)
    assert plan.step.context_length == 32
    assert plan.step.decoder == Decoder(plan.step.decoder).config
    assert plan.tokens_per_step == 8 * 32
