"""One stage as a flow of its own: what a deployment runs on its own image and hardware.

It starts the stage's command line in a child process, so what runs in the container is what a person runs by hand.
"""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.child import run_stage, start_over, stop_all
from flows.reporting import reporter_for_run
from stages.config import Config
from stages.core.errors import LoralineError
from stages.core.events import StageFailed
from stages.core.runner import Slice, describe
from stages.pipeline import Pipeline

# The name of a failed state that is worth another try; whoever dispatched the run looks for it.
TRANSIENT = "TransientFailure"
# Stands before the fingerprint in a completed run's message.
ARTIFACT = "artifact"


def _run_name() -> str:
    """'latents[photos]', and the slice where it is one of several runs of a stage; 'check publish'."""
    parameters = flow_run.get_parameters()
    if parameters.get("check"):
        return f"check {parameters['label']}"
    return " ".join(str(parameters[name]) for name in ("label", "slice") if parameters.get(name))


@flow(name="stage", flow_run_name=_run_name, persist_result=False)
def stage_flow(
    label: str,
    config: Config,
    inputs: dict[str, str] | None = None,
    force: bool = False,
    slice: str | None = None,  # noqa: A002 (the parameter's name in the form)
    merge: bool = False,
    check: bool = False,
) -> State[str]:
    """Runs one stage for one data set, unless its artifact is in the store.

    Args:
        label: the stage and its data set, such as 'latents[photos]' or 'train'.
        config: the whole run: what a configuration file holds.
        inputs: fingerprints of the artifacts to read, by label; what is not given is looked up in the store.
        force: make everything again.
        slice: 'I/N': only every N-th shard from I on; writes no manifest.
        merge: only put finished slices together.
        check: only look whether the stage could run here: its settings, credentials, models.
    """
    pipeline = Pipeline.open(config)
    node = pipeline.node(label)
    reporter = reporter_for_run(config.name)
    start_over()
    try:
        share = Slice.parse(slice) if slice else None
        fingerprint = run_stage(node, pipeline.config, inputs or {}, reporter, force, share, merge, check)
    except LoralineError as error:
        reporter.emit(StageFailed(label, str(error), error.transient))
        return Failed(name=TRANSIENT if error.transient else None, message=str(error))
    except BaseException:  # cancelled or evicted: the stage saves what it has
        stop_all()
        raise
    made = pipeline.store.manifest(node.stage, fingerprint) if fingerprint else None
    # Results are not kept by Prefect: whoever dispatched this run reads the fingerprint out of the message.
    done = f"slice {slice} done" if slice else "its settings are in order"
    text = f"{describe(made)} ({ARTIFACT} {fingerprint})" if made else done
    return Completed(message=text, data=fingerprint)
