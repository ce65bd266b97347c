"""DoRA adapters as input: what the real peft makes of them is in test_lora.py; here their rows, norms and memory."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relexio.checkpoints import dora, product
from relexio.checkpoints.dora import Dora
from relexio.checkpoints.product import Product
from relexio.checkpoints.protocol import Read
from relexio.dtypes import kind_of
from relexio.engine import plan
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError
from tests.support.adapters import CONFIG, CORPUS, WEIGHTS, Q, back, merged, over, run_of, same, store_adapters
from tests.support.make import BF16, Tensors, load_file, save_checkpoint, save_file
from tests.support.steps import CPU, small_blocks

TYPES = {"BF16": BF16, "F16": np.dtype("f2"), "F32": np.dtype("f4")}
MAGNITUDE = f"base_model.model.{Q}.lora_magnitude_vector"
STEPS = {1: "plain", 3: "dora", 4: "dora-bf16"}


def reads(array: np.ndarray, asked: list[int] | None = None) -> Read:
    """Reads an array's bytes; ``asked`` gets how many."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    def read(first: int, out: memoryview) -> None:
        assert len(data) >= first + len(out)
        if asked is not None:
            asked.append(len(out))
        out[:] = data[first : first + len(out)]

    return read


def norm(row: np.ndarray) -> np.float32:
    """As torch adds up on CPUs: every eighth square, one after the other; these eight; what is left."""
    squares, whole = row * row, row.size // 8 * 8
    lanes = [np.float32(0)] * 8
    for at in range(whole):
        lanes[at % 8] += squares[at]
    total = lanes[0]
    for part in (*lanes[1:], *squares[whole:]):
        total += part
    return np.float32(np.sqrt(total))


@given(st.data())
def test_each_row_is_its_sum_over_its_norm_times_its_magnitude(data: st.DataObject) -> None:
    """For any range, in parts of any size."""
    kind, of_magnitude = (data.draw(st.sampled_from(sorted(TYPES))) for _ in "wm")
    rows, width, rank = (data.draw(st.integers(1, most)) for most in (7, 40, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    weight, a, b, m = (rng.normal(size=shape) for shape in ((rows, width), (rank, width), (rows, rank), (rows,)))
    weight, m = weight.astype(TYPES[kind]), m.astype(TYPES[of_magnitude])
    a, b = a.astype("f4"), b.astype("f4")
    made = Product(("a", "F32"), ("b", "F32"), rank, (rows, width), False, False, 0.75)
    sums = weight.astype("f4")
    made.add_to(sums.reshape(-1).view(np.uint32), kind_of("F32"), 0, reads(a), reads(b))
    norms = np.array([norm(row) for row in sums])
    wanted = (sums * (m.astype("f4") / norms)[:, None]).astype(TYPES[kind]).reshape(-1)
    first = data.draw(st.integers(0, wanted.size - 1))
    last = data.draw(st.integers(first + 1, wanted.size))
    bits = np.empty(last - first, kind_of(kind).bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "_ROWS", data.draw(st.integers(1, 40)))
        Dora(made, ("m", of_magnitude)).fill(bits, kind_of(kind), first, reads(weight), (reads(a), reads(b), reads(m)))
    assert bits.tobytes() == wanted[first:last].tobytes()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40, 300, 4099])
def test_norms_are_summed_as_torch_sums_them(width: int) -> None:
    rows = np.random.default_rng(width).normal(size=(20, width)).astype("f4")
    assert dora._norms(rows).tobytes() == np.array([norm(row) for row in rows]).tobytes()


def test_only_whole_rows_of_what_is_asked_for_are_read() -> None:
    weight, asked = np.ones((8, 10), "f4"), list[int]()
    a, b, m = np.ones((2, 10), "f4"), np.ones((8, 2), "f4"), np.ones(8, "f4")
    made = Dora(Product(("a", "F32"), ("b", "F32"), 2, (8, 10), False, False, 1.0), ("m", "F32"))
    made.fill(np.empty(12, np.uint32), kind_of("F32"), 25, reads(weight, asked), (reads(a), reads(b), reads(m)))
    assert sum(asked) == 2 * 10 * 4


def test_a_read_takes_no_more_memory_than_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one row that is wider than what is worked on at once. The product's own part is made small."""
    monkeypatch.setattr(product, "_STRIP", 1 << 9)
    monkeypatch.setattr(product, "_PART", 1 << 12)
    rng = np.random.default_rng(5)
    for out, width in ((3, 300_000), (3000, 300)):
        base = save_checkpoint(tmp_path / f"base-{width}", {"q.weight": rng.normal(size=(out, width)).astype(BF16)})
        adapter = tmp_path / f"adapter-{width}"
        adapter.mkdir()
        save_file(
            adapter / WEIGHTS,
            {
                "base_model.model.q.lora_A.weight": rng.normal(size=(2, width)).astype("f4"),
                "base_model.model.q.lora_B.weight": rng.normal(size=(out, 2)).astype("f4"),
                "base_model.model.q.lora_magnitude_vector": np.ones(out, "f4"),
            },
        )
        (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True}))
        checkpoint = over(adapter, base)
        data = bytearray(2 * out * width)
        checkpoint.read("q.weight", 0, memoryview(data))  # what is loaded once
        tracemalloc.start()
        checkpoint.read("q.weight", 0, memoryview(data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert checkpoint.scratch == product.SCRATCH + 24 * max(1 << 17, width)
        assert peak <= 24 * max(1 << 17, width) + (1 << 19)


def test_a_run_with_blocks_that_end_within_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several workers, and where the base's rows come from the store, in two blocks."""
    small_blocks(monkeypatch, 64, 64)  # rows have 16 and 20 elements
    root = run_of(tmp_path, steps=STEPS)
    at_once = store_adapters(tmp_path / "at-once.zarr", root, tmp_path / "base")
    for step, case in STEPS.items():
        same(back(at_once, step, tmp_path / f"back-{step}"), merged(case))
    shutil.move(root / "checkpoint-3", tmp_path / "three")
    shutil.move(root / "checkpoint-4", tmp_path / "four")
    out = tmp_path / "run.zarr"
    with Resources(workers=2, device="cpu") as threads:
        store_adapters(out, root, tmp_path / "base", threads)
        shutil.rmtree(tmp_path / "base")
        store_adapters(out, None, None, threads, s3=tmp_path / "three")
        stored = store_adapters(out, None, None, threads, s4=tmp_path / "four")
    assert stored.contents == at_once.contents


def test_the_memory_for_rows_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, need = list[int](), plan.convert_need

    def note(*given: int) -> plan.Need:
        planned.append(given[4])
        return need(*given)

    monkeypatch.setattr(plan, "convert_need", note)
    store_adapters(tmp_path / "run.zarr", run_of(tmp_path, steps=STEPS), tmp_path / "base", CPU)
    assert planned[0] == product.SCRATCH + 24 * dora._ROWS


LAYERS = (("model.embed_tokens", 16), ("lm_head", 24), ("model.layers.0.self_attn.v_proj", 16))


def embeddings(adapter: Path) -> None:
    shutil.rmtree(adapter)
    shutil.copytree(CORPUS / "embeddings", adapter)
    vectors = {f"base_model.model.{module}.lora_magnitude_vector": np.ones(size, "f4") for module, size in LAYERS}
    change(lambda t: t.update(vectors), use_dora=True)(adapter)


def change(tensors: Callable[[Tensors], object], **config: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        found = dict(load_file(adapter / WEIGHTS))
        tensors(found)
        save_file(adapter / WEIGHTS, found)
        value = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps({**value, **config}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change(lambda t: t.pop(MAGNITUDE)), [Q, "no lora_magnitude_vector, and use_dora is true"]),
        (change(len, use_dora=False), ["a lora_magnitude_vector, and use_dora is false"]),
        (change(len, use_dora="yes"), ["use_dora are not true or false"]),
        (change(lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:9]})), [MAGNITUDE, "shape [9]", "16 rows"]),
        (change(lambda t: t.update({MAGNITUDE: t[MAGNITUDE][None]})), [MAGNITUDE, "shape [1, 16]"]),
        (change(lambda t: t.update({MAGNITUDE: t[MAGNITUDE].astype("i4")})), [MAGNITUDE, "I32"]),
        (embeddings, ["DoRA of an embedding", "merge_and_unload"]),
    ],
)  # fmt: skip
def test_what_is_not_merged_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], object], words: list[str]
) -> None:
    adapter = Path(shutil.copytree(CORPUS / "dora", tmp_path / "checkpoint-1"))
    spoil(adapter)
    with pytest.raises(CheckpointError) as error:
        over(adapter, CORPUS / "llama-bf16")
    assert not [word for word in (str(adapter), *words) if word not in str(error.value)], error.value


def test_a_layer_that_is_stored_transposed_is_refused(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(CORPUS / "conv1d", tmp_path / "checkpoint-1"))
    names = [name for name in load_file(adapter / WEIGHTS) if "lora_A" in name]
    vectors = {name.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(16, "f4") for name in names}
    change(lambda t: t.update(vectors), use_dora=True)(adapter)
    with pytest.raises(CheckpointError, match=r"DoRA of a layer whose weight is stored transposed .*merge_and_unload"):
        over(adapter, CORPUS / "gpt2")


@pytest.mark.hf
@pytest.mark.filterwarnings("default:::(?!relexio)")
@pytest.mark.parametrize("kind", TYPES)
def test_wide_rows_are_what_peft_makes_of_them(tmp_path: Path, kind: str) -> None:
    """Shares of equal bits are printed, and at most 1 ulp may be between."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[hf]'")
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[rlvr]'")
    torch.manual_seed(1)
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[kind]

    def net(weight: Any = None) -> Any:
        made = torch.nn.ModuleDict({"proj": torch.nn.Linear(4096, 300, bias=False)}).to(getattr(torch, name))
        if weight is not None:
            made.load_state_dict({"proj.weight": weight})
        return made

    plain = net()
    weight = plain["proj"].weight.detach().clone()
    save_checkpoint(tmp_path / "base", {"proj.weight": weight.float().numpy().astype(TYPES[kind])})
    model = peft.get_peft_model(plain, peft.LoraConfig(r=16, target_modules=["proj"], use_dora=True))
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape)
        elif "lora_" in parameter_name:
            parameter.data = 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    wanted = peft.PeftModel.from_pretrained(net(weight), tmp_path / "adapter").merge_and_unload()["proj"].weight
    bits, sign = (np.int16, 0x7FFF) if TYPES[kind].itemsize == 2 else (np.int32, 0x7FFFFFFF)
    found = np.empty((300, 4096), bits)
    over(tmp_path / "adapter", tmp_path / "base").read("proj.weight", 0, found.reshape(-1).view(np.uint8).data)
    one, other = (
        np.where(array < 0, -(array.astype(np.int64) & sign), array)
        for array in (found, wanted.detach().view(getattr(torch, bits.__name__)).numpy())
    )
    ulps = np.abs(one - other)
    print(f"{kind}: {np.mean(ulps == 0):.6f} of {ulps.size} equal, at most {ulps.max()} ulp")
    assert ulps.max() <= 1 and np.mean(ulps == 0) > 0.999
