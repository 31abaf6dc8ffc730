"""Events as lines: each whole, whoever else writes to the same stream."""

from __future__ import annotations

import io
import threading

from stages.core.events import JsonLines, Message, Progress, event_from_json


class Pieces(io.StringIO):
    """Keeps what each call wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_a_line_is_written_in_one_piece() -> None:
    stream = Pieces()
    reporter = JsonLines(stream)
    events = [Message("train", "info", f"message {number}\nof two lines") for number in range(3)]
    for event in events:
        reporter.emit(event)
    assert [piece.count("\n") for piece in stream.pieces] == [1, 1, 1]
    assert [event_from_json(piece) for piece in stream.pieces] == events


def test_threads_that_report_at_once_are_throttled_together() -> None:
    stream = Pieces()
    reporter = JsonLines(stream, every_s=1e6)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for done in range(50):
            reporter.emit(Progress("latents", "images", done, 1000, "image"))
        reporter.emit(Message("latents", "info", str(number)))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = [event_from_json(line) for line in stream.getvalue().splitlines()]
    assert sum(isinstance(event, Progress) for event in events) == 1
    assert {event.text for event in events if isinstance(event, Message)} == {str(number) for number in range(8)}
