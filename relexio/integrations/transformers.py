"""Recording from the Trainer of transformers, and those of TRL: the weights after each optimizer step, no checkpoint needed.

    from relexio.integrations.transformers import RecordCallback
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-1.5B",
        reward_funcs=my_reward,
        args=GRPOConfig(output_dir="runs/grpo", max_steps=500),
        train_dataset=problems,
        callbacks=[RecordCallback("run.zarr")],
    )
    trainer.train()

Then ``relexio backtest run.zarr``, also while it trains. LoRA (``peft_config``) is recorded merged. Every process of a
distributed run holds the callback; the first one writes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from relexio.errors import RelexioError, RequestError
from relexio.integrations.weights import Weight, gathered, weights_of
from relexio.recorder import Recorder
from relexio.verbs.convert.request import existing_store

try:
    import torch
    from huggingface_hub import try_to_load_from_cache
    from transformers import PreTrainedModel, TrainerCallback
except ImportError as error:
    raise ImportError(f"RecordCallback needs torch and transformers ({error}); pip install 'relexio[hf]'") from error

_log = logging.getLogger("relexio")


class RecordCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not look into transformers
    """Records the model in the trajectory ``out`` after every ``every``th optimizer step, and after the last one.

    ``base`` is the model before RL, a directory; by default what the model was loaded from. A trajectory that exists needs
    none. Weights are rounded to the base's types. ``options`` go to the Recorder (``memory``, ``workers``). When
    training is resumed from a checkpoint, the steps behind it that are stored give way to the new ones.

    What is wrong at the beginning of training raises a RelexioError, on every rank. If recording fails later, that is
    logged as an error, then and at the end of training, and training goes on without it.
    """

    def __init__(self, out: str | Path, base: str | Path | None = None, every: int = 1, **options: Any) -> None:
        if every < 1:
            raise RequestError(f"every={every}: record every step (1), every second (2), ...")
        self._out, self._base, self._every, self._options = out, base, every, options
        self._recorder: Recorder | None = None  # of the first rank, while it trains
        self._failure: str | None = None  # of the first rank
        self._on = False  # the same on every rank
        self._last = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Open the trajectory, and compare the model's names and shapes with the base's."""
        self._close()  # what an interrupted run has left, in a notebook
        failure: Exception | None = None
        try:
            weights = weights_of(model)
            if state.is_world_process_zero:
                self._recorder = self._open(model, state.global_step, weights)
        except Exception as error:  # noqa: BLE001  # raised below, when the other ranks know
            failure = error
        told = _of_first_rank(failure and _text(failure))
        if failure or told:
            raise failure or RequestError(told)
        self._on, self._failure, self._last = True, None, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Record the step if it is one of every ``every``, or the last."""
        # The last one here if possible: before on_train_end, the Trainer may load its best model.
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or state.global_step % self._every == 0:
            self._record(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Record the last step if it is not, and wait until all is durable."""
        if state.global_step > self._last:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                _log.warning(
                    "%s: the last step, %d, is not recorded: the model is another", self._out, state.global_step
                )
            else:
                self._record(model, state.global_step)
        self._close()

    def _open(self, model: Any, step: int, weights: list[Weight]) -> Recorder:
        """A recorder for a run that goes on from a step (0: a new one), after a check that the model fits."""
        base = self._base
        if base is None and existing_store(self._out) is None:
            base = _loaded_from(model)
        recorder = Recorder(self._out, base, resumed=step or None, **self._options)
        if recorder.steps and not step:
            raise RequestError(
                f"{self._out}: has steps up to {recorder.steps[-1]} of an earlier run, and this one begins anew; "
                f"give another path, move the old one away, or resume training from a checkpoint"
            )
        convert = _as_in_files(model)
        shapes = ((weight, torch.empty(weight.shape, device="meta")) for weight in weights)
        named = (convert(name, whole) for weight, whole in shapes for name in _names(weight, recorder))
        recorder.check({name: tuple(tensor.shape) for tensors in named for name, tensor in tensors.items()})
        return recorder

    def _record(self, model: Any, step: int) -> None:
        """Gather the model, on every rank, and add it to what is recorded on the first."""
        self._last = step
        self._on = self._on and _of_first_rank(self._failure) is None
        if not self._on:
            return
        weights = gathered(weights_of(model))
        try:
            if self._recorder is not None:
                self._recorder.add(step, _joined(weights, self._recorder, _as_in_files(model)))
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not end a run of days
            self._fail(error)
            _log.error("%s: RECORDING HAS STOPPED, training goes on: %s", self._out, self._failure)
        finally:
            for _ in weights:  # the other ranks wait for this one in each gather, also if nothing more is recorded
                pass

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or _text(error)

    def _close(self) -> None:
        recorder, self._recorder, self._on = self._recorder, None, False
        if recorder is None:
            return
        try:
            recorder.close()
        except Exception as error:  # noqa: BLE001  # as above
            self._fail(error)
        if self._failure is not None:
            stored = f"it has steps up to {recorder.steps[-1]}" if recorder.steps else "it has no step"
            _log.error("%s: DOES NOT HAVE THE WHOLE RUN, %s: %s", self._out, stored, self._failure)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RelexioError) else repr(error)


def _joined(
    weights: Iterator[tuple[Weight, list[Any]]], recorder: Recorder, convert: Callable[[str, Any], Mapping[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """The tensors of a step as the files would have them, one after another."""
    for weight, parts in weights:
        whole = weight.join(*parts)
        for name in _names(weight, recorder):
            yield from convert(name, whole).items()


def _names(weight: Weight, recorder: Recorder) -> tuple[str, ...]:
    """A tied tensor has the names that it has in the base; else its first."""
    return tuple(name for name in weight.names if name in recorder.tensors) or weight.names[:1]


def _as_in_files(model: Any) -> Callable[[str, Any], Mapping[str, Any]]:
    """What ``save_pretrained`` makes of a tensor: since transformers 5, a layer's experts are one tensor in memory only."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        inner = None
    return lambda name, tensor: {name: tensor} if inner is None else revert_weight_conversion(inner, {name: tensor})


def _loaded_from(model: Any) -> Path:
    """The directory that a model was loaded from: its own, or the snapshot in the cache of the Hub."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if name and Path(name).is_dir():
        return Path(name)
    cached = (
        try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None)) if name else None
    )
    if isinstance(cached, str):
        return Path(cached).parent
    where = (
        f"{name} is no directory, and not in the Hub's cache"
        if name
        else "the model does not say what it was loaded from"
    )
    raise RequestError(f'{where}: name the model before RL: RecordCallback(..., base="path/of/the/model")')


def _of_first_rank(value: Any) -> Any:
    """What the first rank has, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
