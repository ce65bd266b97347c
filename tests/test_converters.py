"""Where a form is not read, the error names the whole command that makes a readable one, with the user's own paths.

Commands whose program is installed are run, as the error gives them.
"""

import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from relexio.checkpoints.layout import model_directory, open_checkpoint
from relexio.errors import CheckpointError
from tests.support.adapters import CONFIG, CORPUS, WEIGHTS
from tests.support.command import Relexio
from tests.support.make import load_checkpoint, load_file, save_checkpoint
from tests.support.torch_model import model

#: A directory whose name a shell would take apart.
NAME = "it's mine"
FILES = Path(__file__).parent / "torch_files"


def touch(top: Path, *names: str) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"{}")
    return top


def advice(step: Path, after: str) -> list[str]:
    """The words of the command in the error about a step, behind some text."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model_directory(step), 10)
    text = str(error.value)
    assert "\n" not in text and after in text, text
    return shlex.split(text[text.index(after) + len(after) :].removesuffix(", and then this again"))


@pytest.mark.parametrize(
    ("files", "after", "command"),
    [
        (
            [
                "checkpoint-10/zero_to_fp32.py",
                "checkpoint-10/latest",
                "checkpoint-10/global_step10/zero_pp_0_optim_states.pt",
            ],
            "make one of them: ",
            "python {0}/zero_to_fp32.py {0} {0} --tag global_step10",
        ),
        (
            [
                "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
                "global_step10/mp_rank_00_model_states.pt",
            ],
            "make one of them: ",
            "python -m deepspeed.utils.zero_to_fp32 {0}/.. {0} --tag global_step10",
        ),
        (
            ["global_step_10/actor/model/dist_ckpt/__0_0.distcp", "global_step_10/actor/model/huggingface/config.json"],
            "convert it: ",
            "python -m verl.model_merger merge --backend megatron --local_dir {0}/actor --target_dir {0}/actor/model/huggingface",
        ),
        (
            ["global_step_10/actor/dist_ckpt/__0_0.distcp", "global_step_10/actor/huggingface/tokenizer.json"],
            "convert it: ",
            "python -m verl.model_merger merge --backend megatron --local_dir {0}/actor --target_dir {0}/actor/huggingface",
        ),
        (
            ["step_10/policy/weights/__0_0.distcp", "step_10/policy/weights/.metadata"],
            "convert it: in NeMo-RL, ",
            "uv run examples/converters/convert_dcp_to_hf.py --config={0}/config.yaml --dcp-ckpt-path={0}/policy/weights "
            "--hf-ckpt-path={0}/policy/huggingface",
        ),
        (
            ["step_10/policy/weights/iter_0000000/__0_0.distcp", "step_10/policy/weights/iter_0000000/common.pt"],
            "convert it: in NeMo-RL, ",
            "uv run --extra mcore examples/converters/convert_megatron_to_hf.py --config={0}/config.yaml "
            "--megatron-ckpt-path={0}/policy/weights/iter_0000000 --hf-ckpt-path={0}/policy/huggingface",
        ),
        (
            ["iter_0000010/__0_0.distcp", "iter_0000010/common.pt"],
            "convert it: in Megatron-Bridge, ",
            "scripts/conversion/convert.sh export --hf-model BASE --megatron-path {0} --hf-path {0}/huggingface",
        ),
        (
            ["step-10/__0_0.distcp", "step-10/.metadata"],
            "convert it: in torchtitan, ",
            "python scripts/checkpoint_conversion/convert_to_hf.py {0} {0}/huggingface --hf_assets_path BASE --model_name NAME "
            "--model_flavor FLAVOR",
        ),
        (
            ["checkpoint-10/weights/__0_0.distcp", "checkpoint-10/weights/.metadata"],
            "convert it: if its tensors have Hugging Face's names, ",
            "accelerate merge-weights {0}/weights {0}",
        ),
        (["checkpoint-10/model.pt"], "state_dict: ", "mv {0}/model.pt {0}/pytorch_model.bin"),
    ],
)
def test_the_command_is_whole(tmp_path: Path, files: list[str], after: str, command: str) -> None:
    step = touch(tmp_path / NAME, *files) / files[0].split("/")[0]
    wanted = [word.format(step).replace(f"{step}/..", str(step.parent)) for word in command.split()]
    assert advice(step, after) == wanted
    out = Path(wanted[-1].partition("=")[2] or wanted[-1])
    if "--target_dir" in wanted or "/huggingface" in str(out):  # what it writes is found without more words
        save_checkpoint(out, model())
        assert model_directory(step) == out and open_checkpoint(out, 10).tensors


def test_a_head_that_is_tied_is_told_to_the_merger(tmp_path: Path) -> None:
    step = touch(tmp_path, "global_step_10/actor/model/dist_ckpt/__0_0.distcp") / "global_step_10"
    (step / "actor/model/huggingface").mkdir()
    (step / "actor/model/huggingface/config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert "--tie-word-embedding" in advice(step, "convert it: ")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with tarfile.open(FILES / "torch-2.13.tar.xz") as tar:
        tar.extractall(tmp_path / NAME, filter="data")
    return tmp_path / NAME


def test_the_command_for_shards(made: Path) -> None:
    actor = made / "odd-columns" / "actor"
    words = ["--local_dir", str(actor), "--target_dir", str(actor / "huggingface")]
    wanted = ["python", "-m", "verl.model_merger", "merge", "--backend", "fsdp", *words]
    assert advice(actor, "and then this again: ") == wanted
    for odd in ("odd-partial", "odd-strided", "odd-twice"):
        assert advice(made / odd / "actor", "write the model too, with ") == [
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
        ]


def test_an_adapter_of_verls_merger_without_alpha_is_refused(tmp_path: Path) -> None:
    adapter = touch(tmp_path, WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 0}))
    with pytest.raises(
        CheckpointError, match="lora_alpha is 0, as verl's merger writes it; set it to that of training"
    ):
        open_checkpoint(adapter, 10)


def run(words: list[str]) -> None:
    """Run a command as the error gave it, with the Python of the tests."""
    programs = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    done = subprocess.run([*programs[words[0]], *words[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_accelerate_makes_a_model_of_dcp(made: Path, relexio: Relexio, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    step = made / "dcp" / "checkpoint-3"
    (step / "pytorch_model_fsdp_0").rename(step / "weights")  # as any other program calls it
    base = save_checkpoint(tmp_path / "base", model())
    command = ("convert", step.parent, "--base", base, "-o", tmp_path / "run.zarr", "--steps", "3")
    assert relexio(*command).code == 1
    run(advice(step, "names, "))
    assert {name: array.tobytes() for name, array in load_checkpoint(step).items()} == {
        name: array.tobytes() for name, array in model().items()
    }
    assert "is the base itself" in relexio(*command).err, "it is read, and has the base's bits"


@pytest.mark.slow
def test_torch_makes_safetensors_of_an_adapter(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter, tensors = tmp_path / NAME, load_file(CORPUS / "plain" / WEIGHTS)
    touch(adapter, CONFIG)
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    torch.save(state, adapter / "adapter_model.bin")
    run(advice(adapter, "save it as safetensors: "))
    assert {n: a.tobytes() for n, a in load_file(adapter / WEIGHTS).items()} == {
        n: a.tobytes() for n, a in tensors.items()
    }


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*have invalid shape")  # a bias is no matrix
def test_peft_merges_what_is_not_merged_here(tmp_path: Path, relexio: Relexio) -> None:
    peft = pytest.importorskip("peft")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from relexio.verbs.demo.data import unpack

    base = unpack(tmp_path / "demo").base
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    step = tmp_path / NAME / "checkpoint-10"
    peft.get_peft_model(plain, lora).save_pretrained(step)
    command = ["convert", step.parent, "--base", base, "-o", tmp_path / "run.zarr"]
    done = relexio(*command)
    assert done.code == 1 and "lora_bias is set" in done.err
    text = done.err[done.err.index("python -c") :]
    words = shlex.split(text.partition(", and give ")[0])
    run(words)
    given = shlex.split(text.partition(", and give ")[2])
    done = relexio("convert", *given, *command[2:], "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["added"] == [10]
