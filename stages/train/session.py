"""One run of the train stage: from reading its inputs to the finished artifact."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from stages.core.artifact import NamedFile, Output
from stages.core.errors import InputError
from stages.core.stage import Context, Inputs
from stages.models.device import pick_device, set_threads, torch_dtype
from stages.models.source import ModelSource
from stages.models.transformer import ADAPTER, add_lora, load_transformer
from stages.train.checkpoint import Checkpoints, restore
from stages.train.data import TextEmbeddings, TrainingData, read_entries
from stages.train.draws import seed_for
from stages.train.export import FILE, export_adapter
from stages.train.heldout import HeldOut, border_of, choose_held_out
from stages.train.journal import Journal
from stages.train.loop import Trainer
from stages.train.order import Order
from stages.train.previous import find_previous, load_weights, worn
from stages.train.validation import Painter, as_loaded


@dataclass
class History:
    """All that a run has made so far beside its adapter: the artifact's tables, kept in every checkpoint."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    """Step, index, prompt and file name of each, and the stored file."""
    previous: dict[str, Any] | None = None
    """The held-out loss of the adapter published before, where there is one; see `Session._measure_previous`."""

    def record(self) -> dict[str, Any]:
        return {"steps": self.steps, "rounds": self.rounds, "pictures": self.pictures, "previous": self.previous}


class Session:
    """One run of the stage, from reading its inputs to the finished artifact.

    Args:
        context: of the stage.
        inputs: manifests of download and latents of every data set, and of embeds.
    """

    def __init__(self, context: Context, inputs: Inputs) -> None:
        self.context, self.config, self.section = context, context.config, context.config.train
        self.name = f"train-{context.fingerprint[:16]}"
        self.started = time.monotonic()
        set_threads()
        self.device = pick_device(self.section.device, "train.device")
        self.dtype = torch_dtype(self.section.mixed_precision)
        self.source = ModelSource(self.config.model, context.store)
        self.previous = find_previous(context.store, self.section)
        text = TextEmbeddings(context.store, inputs.one("embeds"), self.config.embeds.t5_length)
        self.trainer, self.table = self._trainer(inputs, text)
        self.held_out = HeldOut(self.section, self.trainer.data, self.trainer.patch_size, self.config.seed)
        folder = context.scratch / "validation"
        folder.mkdir()
        self.painter = Painter(self.config.validation, self.source, text, self.device, self.dtype, folder)
        self.history = History()
        self.journal: Journal | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.data.close()
        if self.journal is not None:
            self.journal.close()

    # -- getting ready ------------------------------------------------------------------------------------------------

    def _trainer(self, inputs: Inputs, text: TextEmbeddings) -> tuple[Trainer, list[dict[str, Any]]]:
        section, seed, context = self.section, self.config.seed, self.context
        entries = read_entries(context.store, inputs.all("download"), inputs.all("latents"))
        images = [image for entry in entries for image in entry.images]
        needed = section.train_batch_size * section.gradient_accumulation_steps
        held = self._choose_held_out(images, needed)
        window = min(section.shuffle_shards, max(1, len(entries)))
        data = TrainingData(context.store, entries, text, held, self.device, self.dtype, shards_open=2 * window)
        if not data.samples:
            raise InputError("train: the latents hold no sample to train on; look at what bucket refused")
        repeats = {dataset.id: dataset.repeats for dataset in self.config.datasets}
        order = Order(data.shard_rows(repeats), section.train_batch_size, section.shuffle_shards, seed)
        self._describe_data(data, order)
        model, report = load_transformer(
            self.source, self.dtype, self.device, section.base_model_precision, section.quantize_exclude
        )
        context.log(f"base: {report.summary()}")
        adapter = add_lora(
            model,
            section.lora.rank,
            section.lora.scaled_alpha,
            section.lora.dropout,
            section.lora.targets,
            section.lora.exclude_blocks,
            seed_for(seed, "adapter"),
        )
        count = sum(part.numel() for part in adapter.values())
        context.log(f"adapter: {count:,} parameters in {len(adapter) // 2} layers, rank {section.lora.rank}")
        if section.warm_start and self.previous is not None:
            load_weights(context.store, self.previous, adapter, ADAPTER)
            context.log(f"warm start: from the weights of the adapter of {self.previous.fingerprint[:12]}")
        elif section.warm_start:
            context.log("warm start: there is no adapter yet to start from (train.previous); it starts from nothing")
        if section.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return Trainer(section, seed, model, adapter, data, order, self._accelerator()), report.grouped()

    def _choose_held_out(self, images: list[str], needed: int) -> set[str]:
        """The images to hold out: ones that the previous adapter was not trained on either, where there are such."""
        choice = self.section.evaluation
        border = self.previous.border if self.previous is not None else None
        held = choose_held_out(images, choice.share, choice.max_samples, needed, border)
        self.comparable = self.previous is not None and bool(held)
        if not held:
            held = choose_held_out(images, choice.share, choice.max_samples, needed)
        self.border = border_of(held)
        if self.section.warm_start and border is not None:
            self.border = min(self.border, border)  # what the previous one has seen, this one has seen
        return held

    def _accelerator(self) -> Accelerator:
        # Accelerate keeps its first settings for the whole process; a process may train twice (tests, a flow).
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision=self.section.mixed_precision, cpu=self.device.type == "cpu")
        PartialState().device = self.device
        return accelerator

    def _describe_data(self, data: TrainingData, order: Order) -> None:
        buckets = order.bucket_samples
        sizes = ", ".join(f"{width}x{height} {count}" for (width, height), count in buckets.items())
        self.context.log(
            f"{data.samples} samples to train on, {len(data.held_out)} held out; an epoch has "
            f"{order.batches_per_epoch} batches: {sizes}"
        )
        filled = order.filled_per_epoch
        if filled:
            sizes = ", ".join(f"{width}x{height} {count}" for (width, height), count in filled.items())
            self.context.log(
                f"these buckets do not divide into batches of {self.section.train_batch_size}; places filled with "
                f"samples shown already, in every epoch: {sizes}"
            )
        if self.section.evaluation.share > 0 and not data.held_out:
            self.context.log("too few images to hold any out: there is no held-out loss", "warning")

    # -- training -----------------------------------------------------------------------------------------------------

    def run(self) -> Output:
        context, trainer, last = self.context, self.trainer, self.section.steps
        checkpoints = Checkpoints(context.store, self.name, self.section.keep_checkpoints, context.scratch)
        if context.force:
            checkpoints.clear()
        saved, warnings = checkpoints.newest()
        for warning in warnings:
            context.log(warning, "warning")
        start = 0
        if saved is not None:
            restore(saved, trainer.adapter, trainer.optimiser)
            self.history, start = History(**saved.history), saved.step
            context.log(f"going on after step {start} of {last}, where an earlier run was cut off")
        self.journal = Journal(context.store, self.name, context.scratch, start)
        if saved is None:
            self._measure_previous()
            self._look(0)
        with (
            context.progress("training", last, "step", done=start) as bar,
            trainer.batches(start) as batches,
        ):
            trainer.model.train()
            for step in range(start + 1, last + 1):
                result = trainer.train_step(step, batches)
                self.history.steps.append(result.record())
                numbers = {"loss": result.loss, "lr": result.learning_rate, "grad_norm": result.grad_norm}
                self.journal.numbers(step, numbers)
                context.metric(step, numbers)
                bar.advance(1, f"loss {result.loss:.4f}, lr {result.learning_rate:.2e}")
                self._look(step)
                if step < last and (step % self.section.checkpoint_every == 0 or context.stop.requested):
                    checkpoints.save(step, trainer.adapter, trainer.optimiser, self.history.record())
                    self.journal.upload()
                    context.check_stop()
        self.journal.upload()
        return self._output()

    def _look(self, step: int) -> None:
        """Measures the held-out loss and draws the validation prompts, where this step is one to do so."""
        last = step == self.section.steps
        evaluate = len(self.held_out) > 0 and (step % self.section.evaluation.every == 0 or last)
        draw = bool(self.config.validation.prompts) and (step % self.config.validation.every == 0 or last)
        if not (evaluate or draw):
            return
        self.trainer.model.eval()
        if evaluate:
            self._evaluate(step)
        if draw:
            self._draw(step)
        self.trainer.model.train()

    def _measure_previous(self) -> None:
        """The held-out loss of the previous adapter: what a quality gate compares the new one's with."""
        if self.previous is None:
            return
        record: dict[str, Any] = {"fingerprint": self.previous.fingerprint}
        if not self.comparable:
            reason = "every picture that could be held out may be one that it was trained on"
            record["reason"] = reason if len(self.held_out) else "no pictures are held out"
            self.context.log(f"the adapter of {self.previous.fingerprint[:12]} is not measured: {record['reason']}")
        else:
            with (
                torch.no_grad(),
                self.context.progress("held-out loss of the adapter before", self.held_out.passes, "pass") as bar,
                worn(self.trainer.model, self.context.store, self.previous),
            ):
                found = self.held_out.evaluate(0, self.trainer.predict, bar.advance)
            record |= {"loss": found.loss, "by_sigma": found.by_sigma}
            self.context.log(
                f"held-out loss of the adapter of {self.previous.fingerprint[:12]}, which this one is measured "
                f"against: {found.loss:.5f}"
            )
        self.history.previous = record

    def _evaluate(self, step: int) -> None:
        assert self.journal is not None
        with (
            torch.no_grad(),
            self.context.progress(f"held-out loss, step {step}", self.held_out.passes, "pass") as bar,
        ):
            found = self.held_out.evaluate(step, self.trainer.predict, bar.advance)
        self.history.rounds.append(found.record())
        self.journal.numbers(step, {"held_out_loss": found.loss})
        self.context.metric(step, {"held_out_loss": found.loss})

    def _draw(self, step: int) -> None:
        assert self.journal is not None
        with (
            self.context.progress(f"validation pictures, step {step}", self.painter.passes, "pass") as bar,
            as_loaded(self.trainer.parameters, self.dtype),
        ):
            drawn = self.painter.draw(self.trainer.model, step, bar.advance)
        for picture in drawn:
            file = self.context.save_file(picture.name, picture.path)
            self.history.pictures.append(
                {
                    "step": picture.step,
                    "index": picture.index,
                    "prompt": picture.prompt,
                    "file": picture.name,
                    "stored": file.model_dump(mode="json"),
                }
            )
            self.context.picture(picture.name, picture.path, f"{picture.prompt} (step {step})")
            self.journal.picture(step, f"validation/{picture.index}", picture.path)

    # -- the artifact -------------------------------------------------------------------------------------------------

    def _output(self) -> Output:
        context, history = self.context, self.history
        folder = context.scratch / "adapter"
        folder.mkdir()
        adapter = export_adapter(self.trainer.model, folder, self._notes())
        # Sorted: records that went through a checkpoint come back with their keys in order.
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in history.steps)
        files = [
            context.save_file(FILE, adapter),
            context.save_file("train.jsonl", lines.encode()),
            context.save_file("evaluation.json", self._evaluation()),
            *(NamedFile.model_validate(picture["stored"]) for picture in history.pictures),
        ]
        samples = self.section.steps * self.section.train_batch_size * self.section.gradient_accumulation_steps
        per_epoch = self.trainer.order.batches_per_epoch
        losses = [record["loss"] for record in history.steps]
        several = max(1, min(50, len(losses) // 10))
        seconds = time.monotonic() - self.started
        info = {
            "steps": self.section.steps,
            "samples": samples,
            "epochs": round(self.section.steps * self.section.gradient_accumulation_steps / per_epoch, 3),
            "loss_first": math.fsum(losses[:several]) / several,
            "loss_last": math.fsum(losses[-several:]) / several,
            "loss_smoothed_over": several,
            "held_out": [[found["step"], found["loss"]] for found in history.rounds],
            "held_out_border": self.border,
            "adapter_parameters": sum(part.numel() for part in self.trainer.parameters),
            "base_layers": self.table,
            "pictures": [
                {name: picture[name] for name in ("step", "index", "prompt", "file")} for picture in history.pictures
            ],
            "seconds": round(seconds, 3),
            "peak_rss_mb": peak_rss_mb(),
            "device": str(self.device),
            "run": self.name,
        }
        if history.previous is not None:
            info["previous"] = {name: value for name, value in history.previous.items() if name != "by_sigma"}
            info["warm_start"] = self.section.warm_start
        counts = {"steps": self.section.steps, "samples_shown": samples, "pictures": len(history.pictures)}
        return Output(files=files, counts=counts, info=info)

    def _evaluation(self) -> bytes:
        data = self.trainer.data
        keys = [
            {"dataset": data.entries[shard].dataset, "key": data.entries[shard].keys[row]}
            for shard, row in data.held_out
        ]
        record: dict[str, Any] = {"held_out": keys, "rounds": self.history.rounds}
        if self.history.previous is not None:
            record["previous"] = self.history.previous
        return json.dumps(record, indent=1, sort_keys=True).encode()

    def _notes(self) -> dict[str, str]:
        """What the adapter's file says of itself, beside what loading needs."""
        section = self.section
        shift = section.sigmas.shift
        return {
            "loraline.objective": section.objective,
            "loraline.sigma_sampling": section.sigmas.sampling,
            "loraline.sigma_shift": shift if isinstance(shift, str) else f"{shift:g}",
            # A folder's path says nothing elsewhere; its weights are named below.
            **({"loraline.base_model": self.source.name} if self.source.commit else {}),
            "loraline.base_model_weights": self.source.identity("transformer")["weights"],
            "loraline.base_model_precision": section.base_model_precision,
            "loraline.steps": str(section.steps),
            **({"loraline.warm_start": str(section.previous)} if section.warm_start and section.previous else {}),
            "loraline.train_fingerprint": self.context.fingerprint,
        }


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
