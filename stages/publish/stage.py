"""publish: the adapter with its card, pictures and provenance, to a folder or to the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stages.core.artifact import Manifest, Output
from stages.core.stage import Context, Inputs, Need, Setting, Stage
from stages.publish.folder import check_folder, gone_from_folder, publish_to_folder
from stages.publish.gate import decide, read_losses
from stages.publish.hub import HubTarget
from stages.publish.package import ADAPTER, RECORD, build_package

_HUB_NAME = re.compile(r"[\w\-][\w.\-]*/[\w.\-]+")


class PublishStage(Stage):
    """Every stage's artifact is an input: the record leads back to the images, settings, code and weights of each."""

    name = "publish"
    version = 1
    hardware = "cpu"
    per_dataset = False
    needs = (Need("download", "pairs"), Need("bucket"), Need("latents"), Need("embeds"), Need("train"))
    summary = "puts the adapter, its model card and its provenance on the Hub or into a folder"

    def settings(self, setting: Setting) -> dict[str, Any]:
        """Where it goes, and what the card says: whatever decides a byte of what is published."""
        config, section = setting.config, setting.config.publish
        target = {"repo": section.repo, "branch": section.branch} if section.target == "hub" else {"path": section.path}
        validation = config.validation
        gate = {} if section.maximum_regression is None else {"maximum_regression": section.maximum_regression}
        return {
            **gate,
            "target": {"kind": section.target, **target},
            "name": config.name,
            "license": section.license,
            "trigger": section.trigger,
            "description": section.description,
            "base": {"name": config.model.pretrained_model_name_or_path, "revision": config.model.revision},
            "seed": config.seed,
            "training": _card_settings(setting),
            "validation": {
                "prompts": validation.prompts,
                "negative_prompt": validation.negative_prompt,
                "guidance_scale": validation.guidance_scale,
                "inference_steps": validation.inference_steps,
                "size": [validation.width, validation.height],
            },
        }

    def check(self, setting: Setting) -> None:
        section = setting.config.publish
        if section.target == "hub":
            HubTarget(section).check()
        elif section.path is not None:
            check_folder(section.path)

    def still_there(self, setting: Setting, manifest: Manifest) -> str | None:
        if manifest.info.get("published") is False:
            return None  # a refusal stands: the same adapter measured against the same one is refused again
        section = setting.config.publish
        if section.target == "hub":
            return HubTarget(section).gone(manifest)
        return gone_from_folder(manifest, section.path or "", setting.store.digests)

    def run(self, context: Context, inputs: Inputs) -> Output:
        """Publishes, unless the quality gate says no: that is a result as well, and no failure."""
        section, train = context.config.publish, inputs.one("train")
        losses = read_losses(context.store, train)
        decision = decide(section.maximum_regression, losses)
        told = {"target": section.target, "published": decision.publish, "decision": decision.words}
        context.log(decision.words, "info" if decision.publish else "warning")
        if not decision.publish:
            info = {**told, "train": train.fingerprint, "current": {"train": losses.fingerprint}}
            return Output(counts={"adapter_not_published": 1}, info=info)
        base = context.config.model.pretrained_model_name_or_path
        on_hub = bool(_HUB_NAME.fullmatch(base)) and not Path(base).expanduser().is_dir()
        package = build_package(context, inputs, on_hub)
        total = sum(item.bytes for item in package.items)
        context.log(f"{len(package.items)} files, {total / 1e6:.1f} MB")
        context.check_stop()
        if section.target == "hub":
            done = HubTarget(section).publish(package, lambda text: context.log(text, "warning"))
            where = done["url"]
            news = "published" if done.pop("commits_made") else "was there already"
        else:
            done = publish_to_folder(package, section.path or "")
            where = section.path
            news = "published" if done.pop("files_written") else "was there already"
        context.log(f"{news}: {where}")
        # The record and the card are the artifact's own files too, so a report can show them without the target.
        files = [context.save_file(name, package.item(name).local) for name in ("README.md", RECORD, ADAPTER)]
        return Output(
            files=files,
            counts={"files": len(package.items)},
            info={
                **told,
                **done,
                "train": train.fingerprint,
                "current": {"train": train.fingerprint},
                "files": package.digests(),
            },
        )


def _card_settings(setting: Setting) -> dict[str, Any]:
    """The training settings that the card names."""
    train = setting.config.train
    return train.model_dump(
        mode="json",
        include={
            **({"previous": True, "warm_start": True} if train.previous else {}),
            "steps": True,
            "train_batch_size": True,
            "gradient_accumulation_steps": True,
            "base_model_precision": True,
            "mixed_precision": True,
            "lora": {"rank", "alpha", "targets"},
            "learning_rate": True,
            "lr_scheduler": True,
            "lr_warmup_steps": True,
            "adam_weight_decay": True,
            "max_grad_norm": True,
            "objective": True,
            "sigmas": {"sampling", "shift"},
            "caption_dropout": True,
        },
    )
