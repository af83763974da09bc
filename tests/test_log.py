from __future__ import annotations

from shoal import log


def test_one_line_a_record_however_often_it_is_configured(capsys):
    log.configure("info", role="first")
    log.configure("info", role="engine")
    log.get_logger("shoal.somewhere").info("up after %d s", 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("[engine] up after 3 s") and " INFO " in lines[0]


def test_rank_is_named_only_where_there_are_several(capsys):
    log.configure("info", role="worker", rank=3, world_size=8)
    log.get_logger("shoal.worker").info("a")
    log.configure("info", role="worker", rank=0, world_size=1)
    log.get_logger("shoal.worker").info("b")
    first, second = capsys.readouterr().err.splitlines()
    assert "[worker 3/8] a" in first and "[worker] b" in second


def test_level_of_argument_then_variable_then_info(monkeypatch, capsys):
    logger = log.get_logger("level")
    log.configure("error")
    logger.warning("hidden")
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "debug")
    log.configure()
    logger.debug("shown")
    monkeypatch.delenv("SHOAL_LOG_LEVEL")
    log.configure()
    logger.debug("hidden again")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["shown"]


def test_names_outside_the_package_get_under_its_roof():
    assert log.get_logger("shoal.x").name == "shoal.x"
    assert log.get_logger("tools").name == "shoal.tools"
