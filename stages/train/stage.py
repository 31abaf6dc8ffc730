"""The train stage: an adapter, its pictures along the way, its curves."""

from __future__ import annotations

from typing import Any

from stages.core.artifact import Output
from stages.core.errors import ConfigError, InputError
from stages.core.stage import Context, Inputs, Need, Setting, Stage
from stages.models.source import ModelSource

# What needs torch is imported late in this file: it takes seconds, and `--help` does not wait for it.

# Settings that never change the numbers: where and how fast it runs, and what is kept on the way.
_IMMATERIAL = {"device", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"}
_COMPONENTS = ("transformer", "vae", "scheduler")


class TrainStage(Stage):
    """Needs the captions' pairing, all latents and the text embeddings; makes the adapter."""

    name = "train"
    version = 1
    hardware = "gpu"
    needs = (Need("download", "pairs"), Need("latents"), Need("embeds"))
    summary = "trains the LoRA adapter by flow matching on the frozen, quantised base"

    def settings(self, setting: Setting) -> dict[str, Any]:
        config = setting.config
        train = config.train.model_dump(mode="json", exclude=_IMMATERIAL)
        train["lora"]["alpha"] = config.train.lora.scaled_alpha
        if config.train.previous is None:  # a training that follows none is the same as before there were such
            del train["previous"], train["warm_start"]
        return {
            "seed": config.seed,
            "train": train,
            "validation": config.validation.model_dump(mode="json"),
            "repeats": {dataset.id: dataset.repeats for dataset in config.datasets},
            "t5_length": config.embeds.t5_length,
        }

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        source = ModelSource(setting.config.model, setting.store)
        return {"model": {component: source.identity(component) for component in _COMPONENTS}}

    def check(self, setting: Setting) -> None:
        from stages.models.device import pick_device
        from stages.models.quantise import LEVELS
        from stages.models.transformer import check_patterns, lora_layers
        from stages.train.previous import check_previous

        section, source = setting.config.train, ModelSource(setting.config.model, setting.store)
        pick_device(section.device, "train.device")
        model = source.config("transformer")
        lora_layers(model, section.lora.targets, section.lora.exclude_blocks)
        if section.base_model_precision in LEVELS:
            check_patterns(model, section.quantize_exclude)
            reason = LEVELS[section.base_model_precision].available()
            if reason is not None:
                raise ConfigError(f"train.base_model_precision: {section.base_model_precision}: {reason}")
        self._check_picture_size(setting, source)
        if section.lr_warmup_steps > section.steps:
            raise ConfigError(
                f"train.lr_warmup_steps: {section.lr_warmup_steps} is more than train.steps, {section.steps}: the full "
                f"learning rate would never be reached"
            )
        if section.previous is not None:
            check_previous(setting.store, section, source.identity("transformer")["config"])

    def _check_picture_size(self, setting: Setting, source: ModelSource) -> None:
        section = setting.config.validation
        if not section.prompts:
            return
        pixels, limit = picture_grid(source)
        for name, size in (("width", section.width), ("height", section.height)):
            if size % pixels:
                near = max(pixels, round(size / pixels) * pixels)
                raise ConfigError(
                    f"validation.{name}: {size} is no multiple of {pixels}, which the model needs; try {near}"
                )
            if size > limit:
                raise ConfigError(f"validation.{name}: {size} is more than this model can draw, {limit}")

    def foresee(self, setting: Setting, done: Inputs) -> None:
        """Refuses data sets that cannot fill one step, as soon as their crops are there."""
        section = setting.config.train
        buckets = done.all("bucket")
        grid: tuple[int, int] | None = None
        for dataset, manifest in buckets.items():
            for shard in manifest.shards:
                if shard.bucket is None or not shard.samples:
                    continue
                grid = grid or picture_grid(ModelSource(setting.config.model, setting.store))
                pixels, limit = grid
                what = f"bucket[{dataset}] has pictures of {shard.bucket[0]}x{shard.bucket[1]}, this model takes"
                if max(shard.bucket) > limit:
                    raise InputError(f"{what} at most {limit} pixels an edge: lower bucket.resolution")
                if any(edge % pixels for edge in shard.bucket):
                    raise InputError(f"{what} edges that are multiples of {pixels}: set bucket.alignment to one")
        if any(dataset.id not in buckets for dataset in setting.config.datasets):
            return
        images = sum(shard.samples for manifest in buckets.values() for shard in manifest.shards)
        batch, parts = section.train_batch_size, section.gradient_accumulation_steps
        if images < batch * parts:
            advice = "Add images"
            if images >= batch:
                advice += f", or lower train.gradient_accumulation_steps to {images // batch}"
            elif images:
                one_part = "" if parts == 1 else " and train.gradient_accumulation_steps to 1"
                advice += f", or lower train.train_batch_size to {images}{one_part}"
            raise InputError(
                f"train: one step takes train_batch_size {batch} x gradient_accumulation_steps {parts} = "
                f"{batch * parts} images, the data sets have {images or 'none'} after cropping. {advice}."
            )

    def run(self, context: Context, inputs: Inputs) -> Output:
        from stages.train.session import Session

        with Session(context, inputs) as session:
            return session.run()


def picture_grid(source: ModelSource) -> tuple[int, int]:
    """What a picture's edges must be a multiple of, and how long they may be, in pixels."""
    transformer, vae = source.config("transformer"), source.config("vae")
    pixels = 2 ** (len(vae["block_out_channels"]) - 1) * int(transformer["patch_size"])
    return pixels, pixels * int(transformer["pos_embed_max_size"])
