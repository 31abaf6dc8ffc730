"""The stage `latents`: cropped pictures become latents, one latent shard for each cropped shard.

1. The VAE is loaded once, and only if a shard is not done yet.
2. A thread reads shards and decodes pictures ahead of the device.
3. Each batch is encoded; one that does not fit the device's memory is halved.
4. A finished shard is uploaded while the next one is encoded, and is remembered when it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Output, Shard
from stages.core.errors import InputError
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Inputs, MapStage, Need, Setting, Unit
from stages.latents.pictures import Batch, batches
from stages.latents.prefetch import Prefetched
from stages.models.device import pick_device, set_threads, torch_dtype
from stages.models.halving import HalvingBatches
from stages.models.source import ModelSource
from stages.models.vae import downsampling, encode, load_vae, scaling, to_pixels

if TYPE_CHECKING:
    import torch

BATCHES_AHEAD = 2


class LatentsStage(MapStage):
    """Encodes cropped pictures with the VAE."""

    name = "latents"
    version = 1
    hardware = "gpu"
    per_dataset = True
    needs = (Need("bucket"),)
    summary = "encodes the cropped pictures with the VAE"

    def settings(self, setting: Setting) -> dict[str, Any]:
        section = setting.config.latents
        return {"dtype": section.dtype, "posterior": section.posterior}

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        source = ModelSource(setting.config.model, setting.store)
        shift, scale = scaling(source.config("vae"))
        return {"vae": source.identity("vae"), "shift_factor": shift, "scaling_factor": scale}

    def check(self, setting: Setting) -> None:
        device = setting.config.latents.device
        if device not in ("auto", "cpu"):  # these two are always there: no need to import torch
            pick_device(device, "latents.device")
        ModelSource(setting.config.model, setting.store).check(["vae"])

    def foresee(self, setting: Setting, done: Inputs) -> None:
        manifest = done.all("bucket").get(setting.the_dataset.id)
        if manifest is None:
            return
        factor = downsampling(ModelSource(setting.config.model, setting.store).config("vae"))
        for shard in manifest.shards:
            if shard.bucket is not None and any(edge % factor for edge in shard.bucket):
                width, height = shard.bucket
                raise InputError(
                    f"latents[{setting.the_dataset.id}]: crops of {width}x{height} pixels do not divide by the VAE's "
                    f"{factor}: set bucket.alignment to a multiple of {factor}"
                )

    def units(self, context: Context, inputs: Inputs) -> list[Unit]:
        return [
            Unit(index, shard.name, shard.sha256, shard.samples, shard)
            for index, shard in enumerate(shard for shard in inputs.one("bucket").shards if shard.samples)
        ]

    def process(self, context: Context, inputs: Inputs, units: Sequence[Unit]) -> Iterator[tuple[Unit, Output]]:
        section = context.config.latents
        set_threads()
        device = pick_device(section.device, "latents.device")
        vae = load_vae(ModelSource(context.config.model, context.store), torch_dtype(section.dtype), device)
        encoder = _Encoder(context, vae, device)
        total = sum(unit.samples for unit in units)
        with (
            context.progress("encode", total, "image") as bar,
            ThreadPoolExecutor(1, "upload") as uploader,
            Prefetched(_read_ahead(context, units, section.batch_size), BATCHES_AHEAD) as ahead,
        ):
            arriving: tuple[Unit, Future[Shard]] | None = None
            writer: ShardWriter | None = None
            try:
                for unit, batch in ahead:
                    if writer is None:
                        writer = ShardWriter(context.scratch / f"{unit.index}.tar")
                    for key, members in encoder.samples(unit.payload, batch):
                        writer.write(key, members)
                    bar.advance(len(batch.keys), unit.name)
                    if arriving is not None and (batch.last or arriving[1].done()):
                        # Remembered as soon as it has arrived. One upload at a time: at most two shards lie in the
                        # scratch folder.
                        yield _finished(*arriving)
                        arriving = None
                    if batch.last:
                        writer.close()
                        arriving = (unit, uploader.submit(_save, context, writer, unit.payload))
                        writer = None
            except Exception:
                if arriving is not None:  # a shard that fails does not take the finished one before it along
                    yield _finished(*arriving)
                raise
            if arriving is not None:
                yield _finished(*arriving)

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        output = Output.joined(outputs)
        return output.model_copy(update={"info": {"dtype": context.config.latents.dtype}})


class _Encoder:
    """The VAE at work: batches of pictures become members of a shard."""

    def __init__(self, context: Context, vae: Any, device: torch.device) -> None:
        self._section = context.config.latents
        self._vae = vae
        self._device = device
        self._batches = HalvingBatches(
            self._section.batch_size,
            device,
            lambda text: context.log(text, "warning"),
            "Use latents.dtype: bf16, a smaller bucket.resolution, or latents.device: cpu.",
        )

    def samples(self, shard: Shard, batch: Batch) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of each picture of the batch.

        Raises:
            InputError: latents that are not numbers.
            ConfigError: one picture alone does not fit the device's memory.
        """
        import torch
        from safetensors.torch import save

        dtype = torch_dtype(self._section.dtype)

        def work(part: slice) -> torch.Tensor:
            pixels_BCHW = to_pixels(batch.rgb_BHWC[part], dtype, self._device)
            return encode(self._vae, pixels_BCHW, self._section.posterior, batch.seeds[part]).cpu()

        latents_BCHW = torch.cat(self._batches.run(len(batch.keys), work))
        finite_B = torch.isfinite(latents_BCHW).flatten(1).all(dim=1)
        for key, geometry, latents_CHW, finite in zip(
            batch.keys, batch.geometry, latents_BCHW, finite_B.tolist(), strict=True
        ):
            if not finite:
                raise InputError(
                    f"latents: the VAE makes no finite numbers of sample {key} (cropped shard {shard.name}) in "
                    f"{self._section.dtype}. Set latents.dtype: fp32; if it is fp32 already, the VAE's weights are bad."
                )
            yield key, {"safetensors": save({"latents": latents_CHW.contiguous()}), "json": geometry}


def _read_ahead(context: Context, units: Sequence[Unit], size: int) -> Iterator[tuple[Unit, Batch]]:
    for unit in units:
        for batch in batches(context.store.fetch(unit.payload), unit.payload, size):
            yield unit, batch


def _save(context: Context, writer: ShardWriter, source: Shard) -> Shard:
    # Named by what it was made of, as its memo is: a name that followed the unit's number would tell lies after
    # shards were added.
    width, height = source.bucket or (0, 0)
    name = f"latents-{width}x{height}-{source.sha256[:12]}"
    return context.save_shard(writer.path, name, source.samples, source.bucket, keys=writer.keys)


def _finished(unit: Unit, upload: Future[Shard]) -> tuple[Unit, Output]:
    shard = upload.result()
    return unit, Output(shards=[shard], counts={"images": shard.samples})
