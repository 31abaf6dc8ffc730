"""Makes the automations of a YAML file on the server: each once, by its name; one that is there is brought up to date.

    python deploy/automations.py [deploy/automations.yaml]

`prefect automation create` would make a second one of the same name. One that is as the file says is left alone, since
an update forgets the runs that it was watching; one that somebody has switched off stays off.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from server import look_for_server

FILE = Path(__file__).with_name("automations.yaml")


def apply(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Makes the server have this automation, once; what was done about it, in a word."""
    found = sorted(client.read_automations_by_name(wanted.name), key=lambda automation: str(automation.id))
    for extra in found[1:]:
        client.delete_automation(extra.id)
    if not found:
        client.create_automation(wanted)
        return "made"
    wanted.enabled = found[0].enabled
    if _content(found[0]) == _content(wanted):
        return "unchanged"
    client.update_automation(found[0].id, wanted)
    return "updated"


def _content(automation: AutomationCore) -> dict[str, Any]:
    """What it does, without what the server has added."""
    return AutomationCore.model_validate(automation.model_dump()).model_dump(mode="json", exclude={"trigger": {"id"}})


def apply_all(file: Path = FILE) -> None:
    """Makes the server have all automations of a file."""
    with get_client(sync_client=True) as client:
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]:
            wanted = AutomationCore.model_validate(entry)
            print(f"automation {wanted.name!r}: {apply(client, wanted)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    file_ = parser.parse_args().file
    look_for_server(parser)
    apply_all(file_)
