"""``restore``: an observed checkpoint, or the base, written again."""

from functools import partial
from pathlib import Path

from relexio.checkpoints.side import lacking
from relexio.checkpoints.write import write_files
from relexio.engine import graph
from relexio.engine.resources import Resources
from relexio.progress import Stages
from relexio.store.read import observed
from relexio.store.schema import Block
from relexio.store.state import check_content, digest_of
from relexio.store.store import Store
from relexio.verbs.output import Sink, Target, check_targets, needed_files, output_files, side_files, staged


def restore(
    store: Store, step: int | None, out: Path, resources: Resources, stages: Stages, complete: bool = False
) -> list[str]:
    """Write an observed step (None: the base) exactly as it was: same shard names, headers, bytes, and side files.

    One that was not read from safetensors files is written as one such file (``checkpoints.protocol``); beside one that was
    recorded from memory, and with ``complete`` any step, lie those of the base's side files that it lacks, so that it can be
    loaded; their names are returned.
    Raises StoreError where the result is not what was committed; then ``out`` is not created.
    """
    targets = [Target(step or 0, out)]
    check_targets(store, targets)
    record = store.record(step)
    files = output_files(store, record)
    executor = resources.for_combine(store, 1, 1)
    with staged(targets, files) as outputs:
        sink, directory = Sink(tuple(outputs)), Path(outputs[0].directory)
        lacks = lacking(store.base(), record, store.file) if step is not None and (complete or record.recorded) else {}
        write_files(directory, side_files(store, {**record.beside, **lacks}))
        executor.require(needed_files(store, outputs, files))
        with stages("restore", sum(file.size for file in files)) as advance:
            digests = graph.each(store, 1, partial(_restore_block, store, step, sink), executor, advance)
        executor.settle([directory])
        check_content(store, step, digests)  # before it gets its name
    return list(lacks)


def _restore_block(store: Store, step: int | None, sink: Sink, block: Block) -> bytes:
    bits = store.base_bits(block) if step is None else observed(store, block, step)
    sink(block, 0, bits)
    return digest_of(bits)
