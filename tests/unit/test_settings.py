"""Settings come from the environment, and what is wrong with them is said by the variable's name."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from shared.errors import StartupError
from shared.settings import ServiceSettings, load_settings


class OvenSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="OVEN_")

    heat: int = 180
    larder_api_key: SecretStr | None = None


def test_variables_with_the_prefix_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_PORT", "9000")
    monkeypatch.setenv("oven_heat", "200")
    monkeypatch.setenv("PORT", "1")
    settings = load_settings(OvenSettings)
    assert (settings.port, settings.heat, settings.host) == (9000, 200, "127.0.0.1")


def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_HEAT", "")
    assert load_settings(OvenSettings).heat == 180


@pytest.mark.parametrize(
    ("name", "near"), [("OVEN_PROT", "OVEN_PORT"), ("OVEN_MAX_QUEU", "OVEN_MAX_QUEUE"), ("oven_heta", "OVEN_HEAT")]
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(StartupError, match=f"^{name} is set.*did you mean {near}"):
        load_settings(OvenSettings)


def test_a_variable_like_no_other_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_QQQQQ", "1")
    with pytest.raises(StartupError, match=r"OVEN_QQQQQ .* OVEN_HEAT, OVEN_HOST"):
        load_settings(OvenSettings)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("OVEN_PORT", "70000", "OVEN_PORT: .*less than or equal to 65535"),
        ("OVEN_LOG_LEVEL", "loud", "OVEN_LOG_LEVEL: .*'debug'"),
        ("OVEN_DEFAULT_TIMEOUT_MS", "700000", "default_timeout_ms is above max_timeout_ms"),
    ],
)
def test_a_refused_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match=why):
        load_settings(OvenSettings)


def test_a_key_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("of-the-file\n")
    monkeypatch.setenv("OVEN_ADMIN_KEY_FILE", str(path))
    assert load_settings(OvenSettings).admin_key == SecretStr("of-the-file")

    monkeypatch.setenv("OVEN_ADMIN_KEY", "of-the-variable")
    with pytest.raises(StartupError, match="both set"):
        load_settings(OvenSettings)


def test_a_key_of_the_service_itself_may_come_from_a_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("of-the-file\n")
    monkeypatch.setenv("OVEN_LARDER_API_KEY_FILE", str(path))
    assert load_settings(OvenSettings).larder_api_key == SecretStr("of-the-file")


def test_an_empty_variable_names_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_API_KEY_FILE", "")
    assert load_settings(OvenSettings).api_key is None


def test_an_empty_key_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("\n")
    monkeypatch.setenv("OVEN_ADMIN_KEY_FILE", str(path))
    with pytest.raises(StartupError, match="OVEN_ADMIN_KEY: the key is empty"):
        load_settings(OvenSettings)


def test_a_key_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OVEN_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(StartupError, match="OVEN_API_KEY_FILE: cannot read"):
        load_settings(OvenSettings)


@pytest.mark.parametrize("key", ["with space", "ключ", "line\nbreak"])
def test_a_key_that_fits_no_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OVEN_API_KEY", key)
    with pytest.raises(StartupError, match="OVEN_API_KEY: a key consists of visible ASCII") as refused:
        load_settings(OvenSettings)
    assert key not in refused.value.message


def test_readers_may_not_hold_the_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_API_KEY", "same")
    monkeypatch.setenv("OVEN_ADMIN_KEY", "same")
    with pytest.raises(StartupError, match="are the same"):
        load_settings(OvenSettings)


def test_clients_have_keys_of_their_own_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("web:one:with:colons\nbatch:two\n")
    monkeypatch.setenv("OVEN_CLIENT_KEYS_FILE", str(path))
    named = load_settings(OvenSettings).named_keys
    assert {name: key.get_secret_value() for name, key in named.items()} == {"web": "one:with:colons", "batch": "two"}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (" , ", "client_keys holds no key"),
        ("secret-alone", "entry 1 of client_keys is not of the form name:key"),
        ("web:secret-one,batch:", "entry 2 of client_keys"),
        ("web:secret-one,web:secret-two", "the name 'web' in client_keys is taken"),
        ("admin:secret-one", "the name 'admin' in client_keys is taken"),
        ("web:secret-one,batch:secret-one", "a key that is given twice"),
        ("web:secret-ключ", "visible ASCII"),
    ],
)
def test_client_keys_that_cannot_be_told_apart_are_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    monkeypatch.setenv("OVEN_CLIENT_KEYS", value)
    with pytest.raises(StartupError, match=why) as refused:
        load_settings(OvenSettings)
    assert "secret-" not in refused.value.message


@pytest.mark.parametrize("origin", ["app.example.org", "https://app.example.org/path", "https://*.example.org"])
def test_what_is_no_origin_is_refused(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("OVEN_CORS_ORIGINS", origin)
    with pytest.raises(StartupError, match=r"OVEN_CORS_ORIGINS: .* is no origin"):
        load_settings(OvenSettings)


def test_a_body_that_no_client_may_send_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_MAX_BODY_BYTES", str(2**30))
    with pytest.raises(StartupError, match="max_body_bytes is above client_share of max_held_bytes"):
        load_settings(OvenSettings)


def test_the_limits_say_what_one_client_may_take() -> None:
    limits = OvenSettings(max_queue=100, client_share=0.25).shared_limits
    assert (limits["max_queue"], limits["max_queue_per_client"]) == (100, 25)


def test_settings_do_not_change_and_hide_their_keys() -> None:
    settings = OvenSettings(admin_key=SecretStr("hidden"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.heat = 1
    assert "hidden" not in repr(settings) + settings.model_dump_json()


def test_every_setting_is_described() -> None:
    assert [name for name, field in ServiceSettings.model_fields.items() if not field.description] == []
