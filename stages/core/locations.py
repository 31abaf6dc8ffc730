"""What a URL means: a local folder, or an object store with the connection settings that hold for all of loraline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stages.core.errors import StoreError
from stages.core.filesystem import Files, LocalFiles, ObjectFiles


def open_files(
    url: str, endpoint_url: str | None = None, region: str | None = None, addressing_style: str = "auto"
) -> Files:
    """The tree of files under a URL. Credentials come from the environment alone.

    Args:
        url: a plain path, 'file://...', 's3://bucket/prefix', or any other URL that fsspec knows.
        endpoint_url, region: of an S3 server; the environment's AWS_ENDPOINT_URL and AWS_DEFAULT_REGION where None.
        addressing_style: 'auto', 'path' or 'virtual'; 'auto' is path style wherever an endpoint is given.

    Raises:
        StoreError: the URL names no bucket.
    """
    if "://" not in url:
        return LocalFiles(Path(url).expanduser())
    protocol, _, rest = url.partition("://")
    if protocol == "file":
        return LocalFiles(Path(rest).expanduser())
    if not rest.strip("/"):
        raise StoreError(f"{url}: names no bucket")
    if protocol != "s3":
        return ObjectFiles(url, {})
    endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "skip_instance_cache": True,
        "max_concurrency": 4,
        "config_kwargs": {
            "signature_version": "s3v4",
            "s3": {"addressing_style": "path" if addressing_style == "auto" and endpoint else addressing_style},
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 3},
            # Several servers return the whole object's checksum for a range, or reject the trailer.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    }
    if endpoint:
        options["endpoint_url"] = endpoint
    if region:
        options["client_kwargs"] = {"region_name": region}
    return ObjectFiles(url, options)
