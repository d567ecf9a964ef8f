"""Settings: read from the environment, refused where they can't be used, and all of them in `sseapp serve --help`."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseapp import SSEApp
from ssecore.errors import SettingsError
from ssecore.settings import Settings
from tests.serving import call_sseapp, free_port, is_clean, run_sseapp, serve

#: The variables of the fields.
VARIABLES = {
    field.name: field.name.upper() if field.name.startswith("openai_") else f"SSEAPP_{field.name.upper()}"
    for field in dataclasses.fields(Settings)
}


def test_without_variables_the_defaults_hold() -> None:
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"PATH": "/bin", "SSEAPP": "1", "XSSEAPP_PORT": "1"}) == Settings()


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 8000, Path("var"))
    assert (settings.heartbeat_s, settings.send_timeout_s, settings.drain_s) == (15, 30, 8)
    assert (settings.auth, settings.max_stream_s, settings.openai_api_key) == (None, None, None)
    assert (settings.mock_delay_s, settings.max_import_bytes) == (0.1, 1024**3)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("SSEAPP_HOST", "::1", "host", "::1"),
        ("SSEAPP_PORT", "0", "port", 0),
        ("SSEAPP_PORT", "65535", "port", 65535),
        ("SSEAPP_DATA_DIR", "/srv/data", "data_dir", Path("/srv/data")),
        ("SSEAPP_AUTH", "off", "auth", "off"),
        ("SSEAPP_AUTH", "", "auth", None),
        ("SSEAPP_HEARTBEAT_S", "0.5", "heartbeat_s", 0.5),
        ("SSEAPP_HEARTBEAT_S", "2", "heartbeat_s", 2.0),
        ("SSEAPP_DRAIN_S", "0", "drain_s", 0.0),
        ("SSEAPP_MAX_STREAM_S", "60", "max_stream_s", 60.0),
        ("SSEAPP_MAX_STREAM_S", "none", "max_stream_s", None),
        ("SSEAPP_MAX_STREAMS", "none", "max_streams", None),
        ("SSEAPP_MAX_STREAMS", "None", "max_streams", None),
        ("SSEAPP_MAX_STREAMS", "12", "max_streams", 12),
        ("SSEAPP_MAX_BODY_BYTES", "1", "max_body_bytes", 1),
        ("OPENAI_BASE_URL", "http://127.0.0.1:1/v1", "openai_base_url", "http://127.0.0.1:1/v1"),
        ("OPENAI_API_KEY", "key", "openai_api_key", "key"),
        ("OPENAI_API_KEY", "", "openai_api_key", None),
        ("OPENAI_MODEL", "", "openai_model", "gpt-4o-mini"),
        ("OPENAI_MODEL", "tiny", "openai_model", "tiny"),
    ],
)
def test_a_variable_sets_its_field(variable: str, text: str, name: str, value: Any) -> None:
    settings = Settings.from_env({variable: text})
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert dataclasses.replace(settings, **{name: getattr(Settings(), name)}) == Settings()


def test_the_environment_is_the_process_own_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSEAPP_PORT", "1234")
    assert Settings.from_env().port == 1234


def test_an_option_wins_over_its_variable() -> None:
    environ = {"SSEAPP_PORT": "1", "SSEAPP_HOST": "::1"}
    settings = Settings.from_env(environ, port="2", host=None, data_dir=None)
    assert (settings.port, settings.host) == (2, "::1")


def test_an_option_hides_a_wrong_variable() -> None:
    assert Settings.from_env({"SSEAPP_PORT": "wrong"}, port="2").port == 2


# Wrong values


@pytest.mark.parametrize(
    ("variable", "text", "expectation"),
    [
        ("SSEAPP_PORT", "http", r"\bint"),
        ("SSEAPP_PORT", "", r"\bint"),
        ("SSEAPP_PORT", "80.5", r"\bint"),
        ("SSEAPP_PORT", "-1", ">= 0"),
        ("SSEAPP_PORT", "65536", "<= 65535"),
        ("SSEAPP_HEARTBEAT_S", "soon", r"\b(float|number)"),
        ("SSEAPP_HEARTBEAT_S", "0", "> 0"),
        ("SSEAPP_HEARTBEAT_S", "-1", "> 0"),
        ("SSEAPP_HEARTBEAT_S", "nan", "> 0"),
        ("SSEAPP_HEARTBEAT_S", "inf", "<= 10000000"),
        ("SSEAPP_DRAIN_S", "nan", ">= 0"),
        ("SSEAPP_MAX_STREAMS", "many", r"\bint.*\bnone\b"),
        ("SSEAPP_MAX_STREAMS", "0", r">= 1.*\bnone\b"),
        ("SSEAPP_MAX_BODY_BYTES", "none", r"\bint"),
        ("SSEAPP_RETRY_MS", "1.5", r"\bint"),
        ("SSEAPP_AUTH", "on", r"\boff\b"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_expectation(variable: str, text: str, expectation: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({variable: text})
    said = re.fullmatch(rf"{variable}={text!r}: (.+)", str(refused.value))
    assert said, refused.value
    assert re.search(expectation, said[1])
    assert refused.value.field == variable


def test_what_is_expected_is_said_once_and_in_words() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({"SSEAPP_MAX_STREAMS": "many"})
    assert "null" not in str(refused.value)
    assert str(refused.value).count("none") == 1


def test_a_wrong_option_is_refused_by_the_name_of_the_option() -> None:
    with pytest.raises(SettingsError, match=r"^--port='x': .*\bint"):
        Settings.from_env({"SSEAPP_PORT": "1"}, port="x")


# Unknown variables


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("SSEAPP_HEARTBEATS", "SSEAPP_HEARTBEAT_S"),
        ("SSEAPP_MAX_STREAM", "SSEAPP_MAX_STREAM"),
        ("SSEAPP_DATADIR", "SSEAPP_DATA_DIR"),
        ("SSEAPP_POTR", "SSEAPP_PORT"),
    ],
)
def test_an_unknown_variable_is_warned_about_with_the_nearest_name(
    variable: str, near: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Settings.from_env({variable: "1"}) == Settings()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(rf"\b{variable}\b.* is it {near}", record.getMessage())


def test_an_unknown_variable_like_no_other_is_warned_about_without_a_guess(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_env({"SSEAPP_QQQQQQQQQQQQQQQ": "1", "QQQ": "1"})
    (message,) = caplog.messages
    assert "SSEAPP_QQQQQQQQQQQQQQQ" in message
    assert "is it" not in message


def test_known_variables_and_those_of_others_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    defaults = {name: getattr(Settings(), name) for name in VARIABLES}
    Settings.from_env(
        {VARIABLES[name]: str(default) for name, default in defaults.items()} | {"HOME": "/", "sseapp_x": ""}
    )
    assert caplog.messages == []


def test_the_value_of_an_unknown_variable_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_env({"SSEAPP_OPENAI_API_KEY": "the-secret"})
    assert len(caplog.messages) == 1
    assert "the-secret" not in caplog.text


# Kubernetes

#: All that Kubernetes sets in each container for a Service `sseapp` with the port 8000 named `http`.
OF_A_SERVICE: Final = {
    "SSEAPP_SERVICE_HOST": "10.96.0.10",
    "SSEAPP_SERVICE_PORT": "8000",
    "SSEAPP_SERVICE_PORT_HTTP": "8000",
    "SSEAPP_PORT": "tcp://10.96.0.10:8000",
    "SSEAPP_PORT_8000_TCP": "tcp://10.96.0.10:8000",
    "SSEAPP_PORT_8000_TCP_PROTO": "tcp",
    "SSEAPP_PORT_8000_TCP_PORT": "8000",
    "SSEAPP_PORT_8000_TCP_ADDR": "10.96.0.10",
}


def test_the_variables_of_a_service_change_nothing_and_one_warning_names_the_port(
    caplog: pytest.LogCaptureFixture,
) -> None:
    of_another = {name.replace("SSEAPP_", "SSEAPP_REDIS_", 1): value for name, value in OF_A_SERVICE.items()}
    assert Settings.from_env(OF_A_SERVICE | of_another) == Settings()
    (message,) = caplog.messages
    assert "SSEAPP_PORT=tcp://10.96.0.10:8000 is ignored" in message and "8000" in message and "--port" in message


def test_an_option_wins_over_the_port_of_a_service_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert Settings.from_env(OF_A_SERVICE, port="9").port == 9
    assert caplog.messages == []


def test_the_service_starts_where_kubernetes_has_a_service_of_its_name(tmp_path: Path) -> None:
    with serve(tmp_path, "--port", "0", env=OF_A_SERVICE) as server:
        assert server.client.get("/healthz").is_success
    assert is_clean(server.log()) and "SSEAPP_" not in server.log()
    # Without the option it takes 8000, at an address that isn't this machine's: another program may have that port.
    elsewhere = run_sseapp("serve", "--host", "192.0.2.1", env=OF_A_SERVICE | {"SSEAPP_AUTH": "off"})
    warning, refusal = elsewhere.stderr.splitlines()
    assert "SSEAPP_PORT=tcp://10.96.0.10:8000 is ignored" in warning and "192.0.2.1:8000" in refusal


@pytest.mark.parametrize("port", ["tcp://10.96.0.10:8000", "wrong"])
def test_the_tokens_are_at_hand_whatever_other_variables_say(port: str, tmp_path: Path) -> None:
    env = OF_A_SERVICE | {"SSEAPP_PORT": port, "SSEAPP_TOKENS_FILE": str(tmp_path / "tokens")}
    assert call_sseapp("token", "add", "ann", env=env).returncode == 0
    listed = call_sseapp("token", "list", env=env)
    assert (listed.returncode, listed.stderr, listed.stdout.split("\t")[1]) == (0, "", "ann")
    for none in ("", "none"):
        assert call_sseapp("token", "list", env=env | {"SSEAPP_TOKENS_FILE": none}).returncode == 2


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("::", ["127.0.0.1", "::1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("127.0.0.2", ["127.0.0.2"]),
        ("localhost", ["localhost"]),
    ],
)
def test_it_is_reached_where_it_listens_and_the_images_health_check_asks_there(
    host: str, reached: list[str], tmp_path: Path
) -> None:
    dockerfile = (Path(__file__).parent.parent / "Dockerfile").read_text()
    (command,) = re.findall(r"(?s)^HEALTHCHECK .*? CMD (\[.*?\])$", dockerfile, re.MULTILINE)
    _, *arguments = json.loads(command.replace("\\\n", ""))
    port = free_port()
    # With credentials, of which there are none: it may listen beyond this machine.
    env = {"SSEAPP_HOST": host, "SSEAPP_PORT": str(port), "SSEAPP_TOKENS_FILE": str(tmp_path / "tokens")}
    with serve(tmp_path, env=env) as server:
        for address in reached:
            with closing(HTTPConnection(address, port, timeout=10)) as client:
                client.request("GET", "/healthz")
                assert client.getresponse().status == 200
        check = [sys.executable, *arguments]
        assert subprocess.run(check, env=env, capture_output=True, timeout=20).returncode == 0
        wrong = env | {"SSEAPP_PORT": str(free_port())}
        assert subprocess.run(check, env=wrong, capture_output=True, timeout=20).returncode != 0
    assert is_clean(server.log())


# Secrets


def test_a_secret_is_not_in_the_repr() -> None:
    settings = Settings.from_env({"OPENAI_API_KEY": "the-secret"})
    assert settings.openai_api_key == "the-secret"
    assert "the-secret" not in f"{settings!r} {settings}"


#: Passwords with characters that end them too early: what is behind would be taken for a port, a path or a fragment.
CUT_URLS = [
    "{scheme}://:S3cret/W0rd@host:6379/0",
    "{scheme}://user:1234/W0rd@host:6379/0",
    "{scheme}://user:S3cret#W0rd@host",
    "{scheme}://user:1234#W0rd@host",
    "{scheme}://user:S3cret?W0rd@host",
    "{scheme}://user:1234?W0rd@host",
    "{scheme}://user:[S3cret@host",
    "{scheme}://user:S3cret\u2100@host",
    "{scheme}://S3cret:W0rd/host",
]


@pytest.mark.parametrize("url", CUT_URLS)
@pytest.mark.parametrize(
    ("variable", "scheme"), [("SSEAPP_LOG", "redis"), ("SSEAPP_LOG", "rediss"), ("OPENAI_BASE_URL", "https")]
)
def test_a_password_that_ends_too_early_is_refused_and_no_part_of_it_said(variable: str, scheme: str, url: str) -> None:
    result = call_sseapp("serve", "--port", "0", env={variable: url.format(scheme=scheme)})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"sseapp: {variable}: ")
    assert not re.search("S3cret|W0rd|1234", result.stderr)


@pytest.mark.parametrize("url", ["S3cret", "S3cret://W0rd", "https//user:S3cret@host", "https://"])
def test_a_base_url_that_is_none_is_not_said(url: str, tmp_path: Path) -> None:
    result = run_sseapp("serve", "--port", "0", "--data-dir", str(tmp_path), env={"OPENAI_BASE_URL": url})
    assert result.returncode not in (0, 1)
    assert "OPENAI_BASE_URL: " in result.stderr
    assert not re.search("S3cret|W0rd", result.stderr)


@given(middle=st.text())
def test_a_password_is_taken_whole_or_refused_and_never_shown(middle: str) -> None:
    password = f"S3cret{middle}W0rd"
    for written in (password, quote(password, safe="", errors="surrogatepass")):
        try:
            settings = Settings(log=f"redis://u:{written}@host:1/0", openai_base_url=f"https://u:{written}@host:1/v1")
        except SettingsError as refused:
            assert written == password and not re.search("S3cret|W0rd", str(refused))
            assert refused.__context__ is None, "its traceback would show it"
        else:
            assert [urlsplit(url).hostname for url in (settings.log, settings.openai_base_url)] == ["host", "host"]
            assert not re.search("S3cret|W0rd", repr(settings))


# The command


def test_help_lists_every_setting_with_its_default() -> None:
    result = call_sseapp("serve", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for field in dataclasses.fields(Settings):
        default = "none" if field.default is None else re.escape(str(field.default))
        listed = rf"(?m)^ +{VARIABLES[field.name]}\s+{re.escape(field.metadata['help'])}\s+\(default: {default}\)$"
        assert re.search(listed, result.stdout), f"{VARIABLES[field.name]} is not in\n{result.stdout}"
    for option in ("--host", "--port", "--data-dir"):
        assert option in result.stdout


def test_the_command_says_what_is_wrong_with_a_variable() -> None:
    result = call_sseapp("serve", env={"SSEAPP_PORT": "http"})
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"sseapp: SSEAPP_PORT='http': .*\bint.*\n", result.stderr)


def test_the_command_says_what_is_wrong_with_an_option() -> None:
    result = call_sseapp("serve", "--port", "99999")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"sseapp: --port='99999': .*65535\n", result.stderr)


def test_the_command_warns_of_an_unknown_variable() -> None:
    result = run_sseapp("serve", "--host", "192.0.2.1", env={"SSEAPP_POTR": "1"})
    assert result.returncode == 2
    assert re.search(r"SSEAPP_POTR.*SSEAPP_PORT\?", result.stderr)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("port", 70_000, "Settings(port=70000): Expected int <= 65535"),
        ("port", "8000", "Settings(port='8000'): Expected int, got str"),
        ("heartbeat_s", 0, "Settings(heartbeat_s=0): Expected float > 0.0"),
        ("log_full_sync", 1, "Settings(log_full_sync=1): Expected bool, got int"),
        ("auth", "on", "Settings(auth='on'): expected off, or None"),
        ("max_runs", -1, "Settings(max_runs=-1): Expected int >= 1, or None"),
        ("log", "redis//:secret@host", "Settings(log=…): expected sqlite, memory, or a Redis URL"),
        ("log", "redis://:sec/ret@host", "Settings(log=…): the URL can't be read."),
        ("openai_api_key", 5, "Settings(openai_api_key=…): Expected str, got int, or None"),
        ("cors_origins", "https://example.com", "Settings(cors_origins='https://example.com'): expected a tuple of"),
        ("cors_origins", ("example.com",), "Settings(cors_origins=('example.com',)): expected a tuple of origins"),
        ("data_dir", 5, "Settings(data_dir=5): expected a path"),
        ("data_dir", None, "Settings(data_dir=None): expected a path"),
    ],
)
def test_what_is_written_in_code_is_checked_too(field: str, value: Any, said: str) -> None:
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(SettingsError) as refusal:
        Settings(**wrong)
    assert str(refusal.value).startswith(said)
    assert field in str(refusal.value.field)


def test_what_is_written_in_code_gets_its_own_type() -> None:
    written: dict[str, Any] = {"data_dir": "var/other", "heartbeat_s": 5, "cors_origins": ["https://example.com"]}
    settings = Settings(**written)
    assert settings == Settings(data_dir=Path("var/other"), heartbeat_s=5.0, cors_origins=("https://example.com",))
    assert type(settings.heartbeat_s) is float


def test_an_app_in_a_program_reads_the_environment_only_if_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSEAPP_MAX_RUNS", "7")
    assert SSEApp([]).settings.max_runs == 1000
    assert SSEApp([], Settings.from_env()).settings.max_runs == 7


def test_texts_name_what_to_write() -> None:
    written, read = Settings(), Settings.from_env({})
    assert (written.written("auth", "off"), read.written("auth", "off")) == ("Settings(auth='off')", "SSEAPP_AUTH=off")
    assert (written.written("log"), read.written("log")) == ("Settings(log=…)", "SSEAPP_LOG")
