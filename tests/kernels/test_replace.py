"""FlashMHF in models that exist: matched parameters, training, saving, and the examples of kernels/examples."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from extras import need
from mhf_kernels import FlashMHF, InitGains, replace_ffn
from torch import nn

need("transformers")
import transformers  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "kernels/examples"


def model(name: str = "Llama", **sizes) -> nn.Module:
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(small | sizes)))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_every_layer_is_replaced_and_learns(name):
    net = model(name)
    replace_ffn(net, d_h=16, d_e=32)
    layers = [layer.mlp for layer in net.model.layers]
    assert all(isinstance(layer, FlashMHF) for layer in layers)
    tokens = torch.randint(96, (2, 16))
    net(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"query_norm": False}, {"skip_linear": True}, {"num_kuv_heads": 2}])
def test_no_other_number_of_subnetworks_is_nearer(options):
    net = model(intermediate_size=300)
    before = count(net.model.layers[0].mlp)
    replace_ffn(net, d_h=16, d_e=32, **options)
    chosen = net.config.flash_mhf["num_subnetworks"]
    apart = {e: abs(count(FlashMHF(64, 4, e, 32, **options)) - before) for e in range(1, chosen + 4)}
    assert min(apart, key=apart.get) == chosen
    assert count(net.model.layers[1].mlp) == count(FlashMHF(64, 4, chosen, 32, **options))


def test_a_real_size_is_matched_within_two_percent():
    with torch.device("meta"):
        net = model(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=1)
        before = count(net.model.layers[0].mlp)
        replace_ffn(net, d_h=128, d_e=256)
    assert abs(count(net.model.layers[0].mlp) / before - 1) < 0.02


@pytest.mark.parametrize(
    ("d_e", "mlp", "warning"),
    [
        (4096, 256, "d_e 4096 and E = 1 has 1517% more parameters than the layer that it replaces; d_e 224 matches"),
        (160, 256, "d_e 160 and E = 1 has 21% fewer parameters than the layer that it replaces; d_e 112 matches"),
        (32, 32, "d_e 32 and E = 1 has 135% more parameters than the layer that it replaces; no smaller d_e matches"),
    ],
)
def test_a_width_that_cannot_match_is_warned_of(d_e, mlp, warning):
    net = model(intermediate_size=mlp)
    before = count(net.model.layers[0].mlp)
    with pytest.warns(UserWarning, match=re.escape(warning)) as found:
        replace_ffn(net, d_h=16, d_e=d_e)
    assert [record.filename for record in found] == [__file__]
    excess = count(net.model.layers[1].mlp) / before - 1
    assert f"{abs(excess):.0%} {'more' if excess > 0 else 'fewer'}" in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_ffn(model(intermediate_size=mlp), **net.config.flash_mhf)  # the number of sub-networks is given
        if named := re.search(r"; d_e (\d+)", warning):
            net = model(intermediate_size=mlp)
            replace_ffn(net, d_h=16, d_e=int(named[1]))
            assert abs(count(net.model.layers[1].mlp) / before - 1) <= 0.05


def test_dtype_device_and_mode_stay():
    net = model().to(torch.bfloat16).eval()
    replace_ffn(net, d_h=16, d_e=32)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not net.model.layers[0].mlp.training


def test_generation_with_a_cache_agrees_with_the_whole_sequence():
    net = model().eval()
    replace_ffn(net, d_h=16, d_e=32)
    prompt = torch.randint(96, (2, 8))
    out = net.generate(prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        whole = net(out.sequences).logits[:, 7:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"gains": InitGains(k_std=0.5)}, {"gains": None, "initialization": "paper"}])
def test_the_settings_are_saved_and_build_the_same_layers(options, tmp_path):
    net = model()
    replace_ffn(net, d_h=16, d_e=32, **options)
    net.save_pretrained(tmp_path)
    again = model()
    replace_ffn(again, **transformers.LlamaConfig.from_pretrained(tmp_path).flash_mhf)
    first, second = net.model.layers[0].mlp, again.model.layers[0].mlp
    assert first.scales == second.scales
    assert first.scales.k_std == (0.5 if options["gains"] else 0.02)
    assert again.config.flash_mhf == net.config.flash_mhf
    assert {name: p.shape for name, p in first.named_parameters()} == {
        name: p.shape for name, p in second.named_parameters()
    }


def test_what_cannot_be_replaced_is_named():
    with pytest.raises(ValueError, match="Linear has no feed-forward layer with gate_proj"):
        replace_ffn(nn.Linear(4, 4), d_h=2, d_e=16)
    with pytest.raises(ValueError, match="d_h must divide the model's width, 64; got 48"):
        replace_ffn(model(), d_h=48, d_e=32)


def test_no_second_device_or_dtype():
    with pytest.raises(ValueError, match="device and dtype are those of the layers that go"):
        replace_ffn(model(), d_h=16, d_e=32, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["Qwen2Moe", "DeepseekV2"])
def test_mixtures_of_experts_are_refused_and_stay(name):
    experts = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    latent = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    net = model(name, **experts, **(latent if name == "DeepseekV2" else {}))
    before = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=f"{name}.* is a mixture of experts"):
        replace_ffn(net, d_h=16, d_e=32)
    assert [type(module) for module in net.modules()] == before


def test_layers_of_several_sizes_need_a_number():
    net, wide = model(), model(intermediate_size=512)
    net.model.layers[1].mlp = wide.model.layers[1].mlp
    with pytest.raises(ValueError, match="the layers have from 49,152 to 98,304 parameters; give num_subnetworks"):
        replace_ffn(net, d_h=16, d_e=32)
    replace_ffn(net, d_h=16, d_e=32, num_subnetworks=7)
    assert {layer.mlp.num_subnetworks for layer in net.model.layers} == {7}


def test_a_shared_layer_stays_shared():
    net = model()
    net.model.layers[1].mlp = net.model.layers[0].mlp
    replace_ffn(net, d_h=16, d_e=32)
    assert net.model.layers[1].mlp is net.model.layers[0].mlp


def run_example(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", printed)]


def test_the_example_in_plain_pytorch_learns():
    first, *_, last = losses(run_example(str(EXAMPLES / "plain_pytorch.py")))
    assert last < first / 2


@pytest.mark.slow
def test_the_example_with_fsdp2_learns():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first, *_, last = losses(run_example(*torchrun, str(EXAMPLES / "fsdp2.py")))
    assert last < 0.8 * first


@pytest.mark.slow
def test_the_example_with_a_hugging_face_trainer_learns_and_is_loaded_again(tmp_path):
    need("accelerate")
    printed = run_example(str(EXAMPLES / "hf_trainer.py"), str(tmp_path / "out"))
    first, *_ = losses(printed)
    assert losses(printed)[2] < first
    assert "largest difference of the logits after loading: 0.0e+00" in printed
