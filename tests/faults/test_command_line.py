"""Any command line at all gives a config or one message that ends with exit code 2; it never writes."""

import os
import string

import pytest

import parameter
from errors import UsageError
from parameter import FLAGS

pytest.importorskip("hypothesis")       # a GPU's machine may lack it
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

HOSTILE = ["", "0", "-1", "1e400", "-inf", "nan", "9" * 40, "1" * 5000, "\0", "/", "..", "../../etc", "a\nb", "\udcff",
           "ä" * 200, "none", "auto", "true", "None", "{}", "1,2,3", ",", ";", "0.5,0.5", "--", "-", "'", '"', "%s",
           "%(x)d", "x" * 300]
GOOD = {flag.name: parameter.written(flag.default) for flag in FLAGS.values() if flag.default is not None}
VALUES = st.one_of(st.sampled_from(HOSTILE), st.integers().map(str), st.floats().map(str),
                   st.text(max_size=20), st.text(string.ascii_letters + ",.;", max_size=8))


@st.composite
def command_lines(draw):
    """A few flags, known and unknown, each with its default, a hostile value, or none."""
    argv = []
    names = st.one_of(st.sampled_from(list(FLAGS)), st.text(string.ascii_lowercase, max_size=9))
    for name in draw(st.lists(names, max_size=6)):
        value = draw(st.one_of(VALUES, st.just(GOOD.get(name, "1"))))
        argv += draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]]))
    return argv


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=command_lines())
@example(argv=["--imsize", "0"])
@example(argv=["--version", "\udcff"])
@example(argv=["--config", "\0"])
@example(argv=["--fake_dir=", "--mode", "evaluate"])
@example(argv=["--z_dim", "1" * 5000])
def test_a_command_line_gives_a_config_or_a_message(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        config = parameter.resolve(parameter.parse([word for word in argv if word not in ("-h", "--help")]))
    except UsageError as error:
        assert str(error) and len(str(error).splitlines()) <= 2
    else:
        text = parameter.as_json(config)
        (tmp_path / "c.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        assert text.startswith("{") and "NaN" not in text and "Infinity" not in text
        os.remove("c.json")
    assert os.listdir(tmp_path) == []
