"""No secret of the environment or the configuration reaches an event file."""

import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timed_run import train

from mhf_lightning.callbacks.run_text import RunText, environment, git_state
from mhf_lightning.redaction import REDACTED, redact, redact_tree, redact_yaml

CANARIES = {
    "HF_TOKEN": "hf_canaryCANARYcanary0123456789",
    "WANDB_API_KEY": "0123456789abcdefcanary0123456789abcdef12",
    "CANARY_SETTING": "canary of a variable that nobody allowed",
    "MHF_API_KEY": "canary-short",  # allowed by its beginning, secret by its name
    "MHF_MIRROR": "https://user:canary-password@mirror.example/simple",  # allowed, with a secret in its value
    "NCCL_DEBUG_FILE": "/tmp/hf_canaryCANARYcanary0123456789.log",
    "SLURM_JOB_NAME": "sk-canary0123456789canary0123456789",
}
SHOWN = {"SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1", "MHF_HEARTBEAT_DIR": "beats", "CUDA_VISIBLE_DEVICES": "0,1"}
CONFIG = """\
run_dir: runs/canary-free
trainer:
  max_steps: 1000
  logger:
    api_key: canary0
    init_args:
      hf_token: "canary1"
      headers: [Bearer hf_canaryCANARYcanary0123456789]
      header: "Authorization: Bearer canary"
      Authorization: Bearer canary
      password: |
        canary of
        two lines
      credentials: {user: canary2, numbers: [canary3]}
      wandbApiKey: canary4
      secret: ${oc.env:WANDB_API_KEY}
data:
  eos_token: <|endoftext|>
  path: data/fineweb-edu-sample-10bt-tokenized
  num_kv_heads: 4
  tokens: 1.0e9
"""


def texts(logdir) -> dict[str, str]:
    events = EventAccumulator(str(logdir), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("run/")]
    return {tag.split("/")[1]: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags}


def test_canaries_are_in_no_event_file(tmp_path, monkeypatch):
    for name, value in {**CANARIES, **SHOWN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("timed_run.RunText", lambda _: RunText(CONFIG))
    train({"strategy": "single", "rows": [[4] * 2], "steps": 2, "logdir": str(tmp_path)})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    written = b"".join(path.read_bytes() for path in files)
    assert b"canary0" not in written
    assert b"canary" not in written.replace(b"canary-free", b"").lower()
    found = texts(tmp_path)
    assert set(found) == {"config", "git", "environment"}
    for name, value in SHOWN.items():
        assert f"| {name} | `{value}` |" in found["environment"]
    assert f"| MHF_API_KEY | `{REDACTED}` |" in found["environment"]
    assert f"| MHF_MIRROR | `https://{REDACTED}mirror.example/simple` |" in found["environment"]
    assert "HF_TOKEN" not in found["environment"]
    assert "run_dir: runs/canary-free" in found["config"]
    assert "path: data/fineweb-edu-sample-10bt-tokenized" in found["config"]
    assert "secret: ${oc.env:WANDB_API_KEY}" in found["config"]


def test_yaml_keeps_its_shape():
    assert redact_yaml("a:\n- name: x\n  api_key: y\n- token: z\n") == (
        f"a:\n- name: x\n  api_key: {REDACTED}\n- token: {REDACTED}\n"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_kv_heads", 4),
        ("max_tokens", 3),
        ("tokenizer", "gpt2"),
        ("eos_token", "<|endoftext|>"),
        ("token", None),
        ("auth", False),
        ("init_from", "models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors"),
        ("api_key", "${oc.env:WANDB_API_KEY}"),
        ("Authorization", "Bearer ${oc.env:TOKEN}"),
        ("header", "Authorization: Bearer ${oc.env:TOKEN}"),
        ("url", "https://me:${oc.env:TOKEN}@host/"),
    ],
)
def test_what_is_no_secret_stays(name, value):
    assert redact_tree({"model": [{name: value}]}) == ({"model": [{name: value}]}, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", 1234),
        ("api_key", "${oc.env:KEY,canary}"),  # a default is no reference
        ("api_key", "${oc.env:KEY}canary"),
        ("header", "authorization=Basic canary"),
        ("anything", "0123456789abcdefcanary0123456789abcdef12"),
    ],
)
def test_what_is_a_secret_is_named(name, value):
    assert redact_tree({"a": {name: value}}) == ({"a": {name: REDACTED}}, [f"a.{name}"])


def test_the_rest_of_a_value_stays():
    assert redact("url", "https://me:canary@host/path") == f"https://{REDACTED}host/path"


def test_versions_are_shown():
    assert environment({})["torch"].startswith("2.")


def test_git_state_names_the_commit_and_what_changed(tmp_path):
    if subprocess.run(["git", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs git")
    assert git_state(tmp_path) == "n/a: not a git checkout"

    def git(*args: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == f"commit `{commit}` on `main`\n\nno changes"
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path).endswith("```\n M a\n```")
