"""The live table of a sweep."""

from __future__ import annotations

import io

from tuning.board import Board


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_for_start_validation_and_end_only():
    out = io.StringIO()
    board = Board({"a": 20, "b": 20}, out=out)
    board.report("a", "start", 0, {})
    board.report("a", "train", 10, {"train/loss": 2.5, "throughput/tokens_per_second": 1234.0, "experts/balance": 0.5})
    board.report("a", "validation", 10, {"validation/loss": 2.25})
    board.finish("a", "done")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    assert "2.5000" in lines[1] and "2.2500" in lines[1] and "1,234 tokens/s" in lines[1] and "+50%" in lines[1]
    assert "done" in lines[2]


def test_a_terminal_gets_one_table_that_is_redrawn_in_place():
    out = Terminal()
    board = Board({"a": 20, "long name": 20}, out=out)
    board.report("a", "start", 0, {})
    board.report("a", "validation", 10, {"validation/loss": 2.25})
    drawn = out.getvalue()
    assert drawn.count("\x1b[2A") == 1 and drawn.count("waiting") == 2
    assert drawn.endswith("\n")


def test_columns_stay_aligned():
    out = io.StringIO()
    board = Board({"a": 20, "long name": 20_000}, out=out)
    board.finish("a", "done", step=20, loss=12.5, validation=3.0, speed=123_456.0, balance=1.25)
    board.finish("long name", "failed")
    first, second = out.getvalue().splitlines()
    assert first.index("loss") == second.index("loss") and first.index("tokens/s") == second.index("tokens/s")
