"""Which model a request means."""

import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from spark_runtime.errors import BadRequestError, MissingModelError
from spark_runtime.models.registry import (
    Identity,
    Registry,
    Wanted,
    derived_version_id,
    identify,
    parse_uri,
    read_date,
    split_assignment,
)
from spark_workers.packages.package import Identity as Told

DIGEST = "ab" * 32
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def registry(*identities: Identity) -> Registry[str]:
    """A registry whose models are the version ids of their identities."""
    found: Registry[str] = Registry()
    for number, each in enumerate(identities):
        found.add(f"model-{number}", each, each.version_id)
    return found


VOLUME_1 = Identity("sales", "volume", "v1", "1.2.0", "s-volume")
VOLUME_2 = Identity("sales", "volume", "v2", "1.10.0", "s-volume")
VOLUME_3 = Identity("Sales", "Volume", "v3", "1.9.9", "s-volume", datetime(2027, 1, 1, tzinfo=UTC))
OLD = Identity("sales", "rates", "r1", "2.0", "s-rates", None, datetime(2025, 12, 31, tzinfo=UTC))
RATES = Identity("sales", "rates", "r2", "1.0", "s-rates", datetime(2026, 1, 1, tzinfo=UTC))
OTHER = Identity("local", "volume", "o1", "0.1")
ALL = registry(VOLUME_1, VOLUME_2, VOLUME_3, OLD, RATES, OTHER)


@pytest.mark.parametrize(
    ("wanted", "version_id"),
    [
        (Wanted(version_id="v1"), "v1"),
        (Wanted(version_id="V1"), "v1"),
        (Wanted(version_id="v1", service="rates", service_id="s-rates"), "v1"),
        (Wanted(folder="sales", service="volume"), "v2"),
        (Wanted(folder="SALES", service="VOLUME"), "v2"),
        (Wanted(service="volume"), "v2"),
        (Wanted(folder="local", service="volume"), "o1"),
        (Wanted(service="volume", version="1.2.0"), "v1"),
        (Wanted(service="volume", version="1.9.9"), "v3"),
        (Wanted(service="volume", version="1.2.0", transaction_date="2027-02-01"), "v1"),
        (Wanted(service="volume", transaction_date="2027-02-01"), "v2"),
        (Wanted(service="rates"), "r2"),
        (Wanted(service="rates", transaction_date="2025-06-30T12:00:00Z"), "r1"),
        (Wanted(service="rates", version="2.0"), "r1"),
        (Wanted(service_id="s-rates"), "r2"),
        (Wanted(service_id="s-rates", version="2.0"), "r1"),
        (Wanted(service_id="s-rates", transaction_date="2025-06-30"), "r1"),
        (Wanted(service="nobody", service_id="s-rates"), "r2"),
        (Wanted(service="rates", service_id="s-volume"), "r2"),
        (Wanted(service_uri="sales/rates"), "r2"),
        (Wanted(service_uri="/sales/rates/"), "r2"),
        (Wanted(service_uri="folders/sales/services/rates"), "r2"),
        (Wanted(service_uri="sales/rates[2.0]"), "r1"),
        (Wanted(service_uri="sales/rates", transaction_date="2025-06-30"), "r1"),
        (Wanted(service_uri="sales/rates", version="2.0"), "r1"),
        (Wanted(service_uri="version/r1"), "r1"),
        (Wanted(service_uri="service/s-volume"), "v2"),
        (Wanted(service_uri="s-rates"), "r2"),
        (Wanted(service_uri="rates"), "r2"),
        (Wanted(service_id="nobody", service_uri="sales/rates"), "r2"),
        (Wanted(model="model-3"), "r1"),
        (Wanted(model="r2"), "r2"),
        (Wanted(model="sales/volume"), "v2"),
        (Wanted(model="sales/volume[1.2.0]", version_id="r1"), "v1"),
    ],
    ids=str,
)
def test_a_model_is_found_by_what_is_said_of_it_in_the_order_of_the_service(wanted: Wanted, version_id: str) -> None:
    assert ALL.find(wanted, NOW) == version_id


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(version_id="v9", service="volume"),
        Wanted(service="volume", version="9.9"),
        Wanted(service="volume", version="1.2"),
        Wanted(folder="elsewhere", service="volume"),
        Wanted(service_uri="sales/rates[9.9]"),
        Wanted(service_uri="a/b/c/d"),
        Wanted(service_uri="version/s-rates"),
        Wanted(service_id="r1"),
        Wanted(model="nobody"),
        Wanted(model="nobody", version_id="v1"),
    ],
    ids=str,
)
def test_a_model_that_is_not_here_is_missing_even_where_one_like_it_is(wanted: Wanted) -> None:
    with pytest.raises(MissingModelError, match=r"there is no model with .*; there are sales/volume\[1\.2\.0\] \(v1\)"):
        ALL.find(wanted, NOW)


def test_the_missing_model_is_told_as_the_service_does() -> None:
    with pytest.raises(MissingModelError) as caught:
        registry().find(Wanted(version_id="v1"))
    message = "there is no model with version id 'v1'; there are none"
    assert caught.value.to_dict() == {"error": {"status": 404, "message": message, "code": "MISSING_MODEL"}}


def test_a_version_that_is_not_effective_is_told_with_the_date() -> None:
    with pytest.raises(MissingModelError, match="no version of it is effective at 2020-01-01T00:00:00"):
        registry(RATES).find(Wanted(service="rates", transaction_date="2020-01-01"))


def test_a_date_that_is_none_matters_only_where_a_model_is_chosen_by_it() -> None:
    assert ALL.find(Wanted(version_id="v1", transaction_date="18/08/2021")) == "v1"
    with pytest.raises(BadRequestError, match="'18/08/2021' is no date; give it as"):
        ALL.find(Wanted(service="volume", transaction_date="18/08/2021"))


def test_the_only_model_need_not_be_named_and_one_of_many_must() -> None:
    assert registry(RATES).find(Wanted(version="7", transaction_date="1999-01-01")) == "r2"
    with pytest.raises(BadRequestError, match="which model is to be called"):
        ALL.find(Wanted())
    with pytest.raises(BadRequestError, match="there are none"):
        registry().find(Wanted())


def test_a_models_name_counts_before_everything_else() -> None:
    found: Registry[str] = Registry()
    found.add("v2", VOLUME_1, "the one named v2")
    found.add("b", VOLUME_2, "the one with the id v2")
    assert found.find(Wanted(model="v2")) == "the one named v2"
    assert found.find(Wanted(version_id="v2")) == "the one with the id v2"


def test_a_model_is_replaced_and_removed_by_its_name() -> None:
    found = registry(VOLUME_1, RATES)
    found.add("model-0", VOLUME_2, "new")
    assert [each.model for each in found] == ["new", "r2"]
    found.remove("model-0")
    found.remove("nobody")
    assert [each.identity.uri for each in found] == ["sales/rates[1.0]"]
    with pytest.raises(MissingModelError):
        found.find(Wanted(version_id="v2"))


def test_one_package_may_be_two_models() -> None:
    found: Registry[int] = Registry()
    found.add("a", identify("x", DIGEST), 1)
    found.add("b", identify("x", DIGEST), 2)
    assert found.find(Wanted(version_id=derived_version_id(DIGEST))) == 1
    assert found.find(Wanted(model="b")) == 2


def test_models_are_found_while_others_come_and_go() -> None:
    found = registry(VOLUME_1)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            found.add("other", RATES, "r2")
            found.remove("other")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(found.find(Wanted(service="volume")) == "v1" for _ in range(2000))
    finally:
        stop.set()
        thread.join()


# --- who a model is ---


def test_a_package_that_says_nothing_is_local_with_an_id_of_its_bytes() -> None:
    found = identify("own_model", DIGEST)
    assert (found.folder, found.service, found.uri) == ("local", "own_model", "local/own_model")
    assert found.version_id == derived_version_id(DIGEST) == "abababab-abab-5bab-abab-abababababab"
    assert found.is_derived
    assert identify("own_model", "cd" * 32).version_id != found.version_id


def test_an_export_says_who_its_model_is() -> None:
    told = Told("sales", "volume", "1.2.0", "v1", "s1", "1.22", "2026-01-01T00:00:00", "2036-01-01T00:00:00")
    found = identify("stem", DIGEST, told)
    assert found.uri == "sales/volume[1.2.0]"
    assert (found.version_id, found.service_id, found.is_derived) == ("v1", "s1", False)
    assert found.is_effective(NOW)
    assert not found.is_effective(datetime(2025, 1, 1, tzinfo=UTC))
    assert not found.is_effective(datetime(2036, 1, 2, tzinfo=UTC))


def test_what_the_user_says_counts_before_what_the_export_says() -> None:
    found = identify("own", DIGEST, Told("sales", "volume", "1.2.0", "v1"), folder="mine", version_id="mine-1")
    assert (found.uri, found.version_id) == ("mine/own[1.2.0]", "mine-1")


def test_an_effective_date_that_cannot_be_read_is_told_and_left_aside(caplog: pytest.LogCaptureFixture) -> None:
    found = identify("x", DIGEST, Told(effective_start="soon\n"))
    assert found.effective_from is None
    assert "'soon\\n', which is no date" in caplog.text or "'soon', which is no date" in caplog.text


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2021-08-18T04:17:17.142Z", datetime(2021, 8, 18, 4, 17, 17, 142000, UTC)),
        ("2021-08-18T04:17:17.1421234Z", datetime(2021, 8, 18, 4, 17, 17, 142123, UTC)),
        ("2021-08-18T06:17:17+02:00", datetime(2021, 8, 18, 4, 17, 17, tzinfo=UTC)),
        ("2021-08-18", datetime(2021, 8, 18, tzinfo=UTC)),
        (datetime(2021, 8, 18), datetime(2021, 8, 18, tzinfo=UTC)),
        (datetime(2021, 8, 18).date(), datetime(2021, 8, 18, tzinfo=UTC)),
        (1629259200000, datetime(2021, 8, 18, 4, tzinfo=UTC)),
    ],
)
def test_dates_are_read_in_every_usual_form(value: Any, moment: datetime) -> None:
    assert read_date(value) == moment


@pytest.mark.parametrize("value", ["", "soon", "2021-13-01", True, 10**30, 1.5, {}, "9" * 1000])
def test_what_is_no_date_is_refused(value: Any) -> None:
    with pytest.raises(BadRequestError, match="is no date; give it as"):
        read_date(value)


def test_uris_are_read_in_every_form() -> None:
    assert parse_uri("f/s") == Wanted(folder="f", service="s")
    assert parse_uri("f/s[1.2]") == Wanted(folder="f", service="s", version="1.2")
    assert parse_uri("folders/f/services/s[1.2]") == Wanted(folder="f", service="s", version="1.2")
    assert parse_uri("version/x") == Wanted(version_id="x")
    assert parse_uri("service/x") == Wanted(service_id="x")
    assert parse_uri("x") == Wanted(version_id="x")
    assert parse_uri("a/b/c") == Wanted(service_uri="a/b/c")


def test_a_uri_is_resolved_where_nothing_else_is_said() -> None:
    assert Wanted(service_uri="f/s", version="2").resolved() == Wanted(folder="f", service="s", version="2")
    assert Wanted(service_uri="f/s", version_id="x").resolved().service_uri == "f/s"
    assert Wanted(model="f/s", version_id="x").resolved() == Wanted(folder="f", service="s")


def test_models_are_named_on_the_command_line() -> None:
    assert split_assignment("sales/volume=a/b=c.zip") == ("sales", "volume", "a/b=c.zip")
    assert split_assignment("model.zip") == ("", "", "model.zip")
    assert split_assignment("./a=b.zip") == ("", "", "./a=b.zip")
    assert split_assignment("/tmp/x/a=b.zip") == ("", "", "/tmp/x/a=b.zip")
    assert split_assignment("/=a.zip") == ("", "", "/=a.zip")


@pytest.mark.parametrize("text", ["volume=a.zip", "sales/=a.zip", "sales/volume=", "sales/vol[1]=a.zip"])
def test_a_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadRequestError):
        split_assignment(text)
