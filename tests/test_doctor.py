"""`rnn2bin doctor`: it says what is there, and its conversion is a real one."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from rnn2bin import cli, doctor, machine, pipeline
from rnn2bin.distill import native
from rnn2bin.runtime import library


def test_command():
    result = CliRunner().invoke(cli.main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["conversion"]["ok"]
    assert found["conversion"]["error"] is None
    assert found["conversion"]["seconds"] < 60
    assert set(found["versions"]) == {"python", *machine.PACKAGES}
    assert found["devices"][0] == "cpu"
    assert found["threads"]["torch"] >= 1
    assert found["disk"]["free_bytes"] > 0
    assert found["kernels"] == {"isa": native.isa(), "bfloat16": native.has_bfloat16()}
    assert found["runtime"] == library.isa()
    text = doctor.render(found)
    assert "works" in text
    assert "packed networks run on torch" in doctor.render(found | {"runtime": None})
    assert all(name in text for name in found["versions"])


def test_missing_kernels_are_named():
    assert "install again with a C compiler" in doctor._kernel_row({"isa": None, "bfloat16": False})
    assert "avx2" in doctor._kernel_row({"isa": "avx2", "bfloat16": False})


def test_a_failed_conversion_is_a_finding(monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(pipeline, "convert", broken)
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "OSError: no space left" in result.output


X86 = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 fma f16c avx512f sse\n"
ARM = "processor : 0\nFeatures : fp asimd sve\n"


@pytest.mark.parametrize(
    ("text", "model", "isa"), [(X86, "Some CPU", ["avx2", "fma", "f16c", "avx512f"]), (ARM, None, ["asimd", "sve"]), (None, None, [])]
)
def test_cpu(tmp_path, text, model, isa):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    found = doctor.cpu(file)
    assert found["isa"] == isa
    assert found["model"] == model if model else found["model"]
