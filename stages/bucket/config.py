"""The `bucket` section: sizes, aspect buckets and crops."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from stages.core.config import Section


class BucketSection(Section):
    """Geometry of the training pictures.

    Sizes are in the unit that `resolution_type` names: megapixels (10^6 pixels) for 'area', pixels of the shorter
    edge for 'pixel', the edge of a square of the same area for 'pixel_area' (1024 means 1.048576 megapixels).
    """

    resolution: float = Field(default=1.0, gt=0)
    """Size that pictures are brought to, in the unit of `resolution_type`."""
    resolution_type: Literal["area", "pixel", "pixel_area"] = "area"
    """The unit of the sizes in this section."""
    crop: bool = True
    """Crop to the aspect that `crop_aspect` asks for; false keeps each picture's own aspect, cut to the alignment."""
    crop_aspect: Literal["square", "preserve"] = "square"
    """'square': every crop is square; 'preserve': the nearest aspect bucket of the picture's own aspect."""
    crop_style: Literal["center", "centre", "random", "corner"] = "center"
    """Where the crop is taken: the middle, a place drawn once from the sample's digest, or the top left corner."""
    minimum_image_size: float = Field(default=0.0, ge=0)
    """Smaller originals are refused; 0 takes all (small ones are enlarged)."""
    maximum_image_size: float | None = Field(default=None, gt=0)
    """Larger originals are scaled to `target_downsample_size` before they are cropped; all others, and all where this
    is not given, are scaled so that the crop just fits into them and shows as much of the picture as it can."""
    target_downsample_size: float | None = Field(default=None, gt=0)
    """Above `resolution`, the crop of a picture that is larger than `maximum_image_size` is a part of it, in more
    detail; the same as `resolution`, it makes no difference. Goes with `maximum_image_size`."""
    maximum_aspect: float = Field(default=4.0, ge=1)
    """Pictures longer than this (long edge to short edge) are refused."""
    alignment: int | None = Field(default=None, ge=1)
    """Edges are multiples of this many pixels; taken from the model by default (64 for Stable Diffusion 3)."""
    max_refused_share: float = Field(default=0.1, ge=0, le=1)
    """The stage fails when more than this share of a data set's images is refused here."""
    processes: int = Field(default=0, ge=0)
    """Processes that decode and resize; 0 is one for each core."""
    workers: int = Field(default=1, ge=1)
    """Machines that share this stage, where each has a deployment of its own (`flow.executor: deployment`)."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> BucketSection:
        if (self.maximum_image_size is None) != (self.target_downsample_size is None):
            raise ValueError("maximum_image_size and target_downsample_size only work together: give both or neither")
        if self.maximum_image_size is not None and self.target_downsample_size is not None:
            if self.target_downsample_size > self.maximum_image_size:
                raise ValueError("target_downsample_size is larger than maximum_image_size: pictures would be enlarged")
            if self.target_downsample_size < self.resolution:
                raise ValueError("target_downsample_size is smaller than resolution: no crop would fit")
        if self.resolution_type == "area" and not 0.001 <= self.resolution <= 20:
            raise ValueError(
                f"resolution: {self.resolution} megapixels; give 0.001 to 20, or resolution_type pixel_area"
            )
        if self.resolution_type != "area" and not 16 <= self.resolution <= 4096:
            raise ValueError(f"resolution: {self.resolution} pixels; give 16 to 4096, or resolution_type: area")
        return self


def _described_as_there(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        field["description"] = BucketSection.model_fields[name].description


class BucketOverrides(Section):
    """Fields of the `bucket` section that a data set may set for itself; what is not given is taken from there."""

    model_config = ConfigDict(json_schema_extra=_described_as_there)

    resolution: float | None = Field(default=None, gt=0)
    resolution_type: Literal["area", "pixel", "pixel_area"] | None = None
    crop: bool | None = None
    crop_aspect: Literal["square", "preserve"] | None = None
    crop_style: Literal["center", "centre", "random", "corner"] | None = None
    minimum_image_size: float | None = Field(default=None, ge=0)
    maximum_image_size: float | None = Field(default=None, gt=0)
    target_downsample_size: float | None = Field(default=None, gt=0)
    maximum_aspect: float | None = Field(default=None, ge=1)
    alignment: int | None = Field(default=None, ge=1)

    def applied_to(self, section: BucketSection) -> BucketSection:
        """The section with these fields put over it.

        Raises:
            pydantic.ValidationError: the two together make no sense.
        """
        return BucketSection.model_validate({**section.model_dump(), **self.model_dump(exclude_none=True)})
