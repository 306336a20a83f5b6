"""Pushing dashboards: what is asked of Grafana, twice, against others' edits, with bad tokens."""

from __future__ import annotations

import importlib.metadata
import socket
from collections.abc import Iterator

import pytest

from dashboards.build import Json, build_all
from dashboards.grafana import GrafanaError, connect
from dashboards.push import push
from tests.dashboards.stub_grafana import TOKEN, StubGrafana


@pytest.fixture(scope="module")
def pages() -> dict[str, Json]:
    return build_all()


@pytest.fixture
def grafana() -> Iterator[StubGrafana]:
    with StubGrafana() as stub:
        yield stub


def test_first_push_makes_folder_and_dashboards(
    grafana: StubGrafana, pages: dict[str, Json]
) -> None:
    done = push(grafana.url, TOKEN, "LLM serving", pages)
    assert [one.outcome for one in done] == ["created"] * 4
    assert grafana.folders == [{"id": 1, "title": "LLM serving", "uid": "llm-serving"}]
    assert list(grafana.dashboards) == list(pages)
    assert done[0].url == f"{grafana.url}/d/afflux-slo/x"
    for uid, stored in grafana.dashboards.items():
        assert stored["meta"]["folderUid"] == "llm-serving"
        content = {k: v for k, v in stored["dashboard"].items() if k not in ("id", "version")}
        assert content == pages[uid]


def test_second_push_writes_nothing(grafana: StubGrafana, pages: dict[str, Json]) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    grafana.requests.clear()
    done = push(grafana.url, TOKEN, "afflux", pages)
    assert [one.outcome for one in done] == ["unchanged"] * 4
    assert grafana.writes() == []
    assert {one["dashboard"]["version"] for one in grafana.dashboards.values()} == {1}


def test_only_what_differs_is_updated_and_keeps_its_uid(
    grafana: StubGrafana, pages: dict[str, Json]
) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    grafana.save({**pages["afflux-slo"], "title": "edited by hand"}, "afflux")
    done = push(grafana.url, TOKEN, "afflux", pages)
    assert [one.outcome for one in done] == ["updated", *["unchanged"] * 3]
    stored = grafana.dashboards["afflux-slo"]["dashboard"]
    assert (stored["title"], stored["version"]) == (pages["afflux-slo"]["title"], 3)


def test_fields_that_grafana_adds_are_no_difference(
    grafana: StubGrafana, pages: dict[str, Json]
) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    for stored in grafana.dashboards.values():
        stored["dashboard"]["fiscalYearStartMonth"] = 0
        stored["dashboard"]["panels"][1]["pluginVersion"] = "12.0.0"
    assert {one.outcome for one in push(grafana.url, TOKEN, "afflux", pages)} == {"unchanged"}


def test_another_folder_moves_them(grafana: StubGrafana, pages: dict[str, Json]) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    done = push(grafana.url, TOKEN, "other", pages)
    assert {one.outcome for one in done} == {"updated"}
    assert {one["meta"]["folderUid"] for one in grafana.dashboards.values()} == {"other"}


def test_an_edit_in_between_is_seen_and_the_push_repeated(
    grafana: StubGrafana, pages: dict[str, Json]
) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    grafana.save({**pages["afflux-slo"], "title": "one edit"}, "afflux")
    edits = iter([True])

    def edit(uid: str) -> None:
        if next(edits, False):
            grafana.save({**pages["afflux-slo"], "title": "another edit"}, "afflux")

    grafana.before_save = edit
    assert push(grafana.url, TOKEN, "afflux", pages)[0].outcome == "updated"
    assert grafana.dashboards["afflux-slo"]["dashboard"]["version"] == 4


def test_edits_again_and_again_are_a_conflict(grafana: StubGrafana, pages: dict[str, Json]) -> None:
    push(grafana.url, TOKEN, "afflux", pages)
    grafana.save({**pages["afflux-slo"], "title": "one edit"}, "afflux")
    grafana.before_save = lambda uid: (
        grafana.save({**pages["afflux-slo"], "title": "yet another"}, "afflux") and None
    )
    with pytest.raises(GrafanaError, match="saves it again and again") as caught:
        push(grafana.url, TOKEN, "afflux", pages)
    assert caught.value.code == "conflict"


def test_a_foreign_dashboard_of_the_same_title_is_a_conflict(
    grafana: StubGrafana, pages: dict[str, Json]
) -> None:
    grafana.save({"uid": "theirs", "title": pages["afflux-slo"]["title"]}, "afflux")
    with pytest.raises(GrafanaError, match="another dashboard of this title") as caught:
        push(grafana.url, TOKEN, "afflux", pages)
    assert caught.value.code == "conflict"
    assert list(grafana.dashboards) == ["theirs"]


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ((403, {"message": "You need Editor"}), "forbidden", "role Editor"),
        ((409, {"message": "already exists"}), "conflict", "already exists"),
        ((500, {"message": "database is locked"}), "grafana", "database is locked"),
        ((400, {"message": "bad JSON"}), "grafana", "HTTP 400.*bad JSON"),
    ],
)
def test_refusals_say_what_to_do(
    grafana: StubGrafana,
    pages: dict[str, Json],
    answer: tuple[int, dict[str, str]],
    code: str,
    words: str,
) -> None:
    grafana.refuse = answer
    with pytest.raises(GrafanaError, match=words) as caught:
        push(grafana.url, TOKEN, "afflux", pages)
    assert caught.value.code == code


def test_bad_token(grafana: StubGrafana, pages: dict[str, Json]) -> None:
    with pytest.raises(GrafanaError, match=r"GRAFANA_TOKEN.*Make a new one") as caught:
        push(grafana.url, "glsa_old", "afflux", pages)
    assert caught.value.code == "bad_token"
    assert "glsa_old" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "token", "code"),
    [
        ("grafana:3000", TOKEN, "bad_url"),
        ("http://", TOKEN, "bad_url"),
        ("http://x", " ", "no_token"),
    ],
)
def test_arguments_are_refused_before_anything_is_sent(url: str, token: str, code: str) -> None:
    with pytest.raises(GrafanaError) as caught:
        connect(url, token)
    assert caught.value.code == code


def test_nobody_there(pages: dict[str, Json]) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(GrafanaError, match="no Grafana at") as caught:
            push(url, TOKEN, "afflux", pages)
    assert caught.value.code == "unreachable"


def test_grafana_below_a_path(pages: dict[str, Json]) -> None:
    with StubGrafana("/grafana") as stub:
        done = push(stub.url, TOKEN, "afflux", pages)
    assert done[0].url == f"{stub.url}/d/afflux-slo/x"
    assert stub.requests[0] == ("GET", "/folders")


def test_urllib3_is_still_urllib3() -> None:
    """A fork that grafana-client brings overwrites it unless it is installed our way."""
    import urllib3

    assert urllib3.__version__ == importlib.metadata.version("urllib3")
