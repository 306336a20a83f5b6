"""The dashboards as built: whole pages, sensible layout, and the committed JSON is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.paths import project_root
from dashboards import lint
from dashboards.build import Json, build_all, text_of, write

PAGES = build_all()
UIDS = ["afflux-slo", "afflux-elasticity", "afflux-dataplane", "afflux-ray"]

every_page = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


def test_uids_stay() -> None:
    """They are in people's links."""
    assert list(PAGES) == UIDS


def test_committed_files_are_what_is_built(tmp_path: Path) -> None:
    """If not: afflux dashboards build -o deploy/grafana/dashboards."""
    committed = project_root() / "deploy" / "grafana" / "dashboards"
    for file in write(tmp_path / "new"):
        assert (committed / file.name).read_text() == file.read_text()
    assert {file.stem for file in committed.glob("*.json")} == set(UIDS)


def test_building_twice_is_building_once() -> None:
    again = build_all()
    assert [text_of(page) for page in again.values()] == [text_of(p) for p in PAGES.values()]


@every_page
def test_panels_fill_their_rows_and_never_overlap(page: Json) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in [*page["panels"], *lint.panels(page)]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"]
    for panel in page["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    bottom = max(y for _, y in taken) + 1
    holes = {y for y in range(bottom) if len({x for x in range(24) if (x, y) in taken}) < 24}
    assert not holes


@every_page
def test_ids_titles_and_rows(page: Json) -> None:
    panels = list(lint.panels(page))
    ids = [panel["id"] for panel in [*page["panels"]]]
    ids += [inner["id"] for row in page["panels"] for inner in row.get("panels") or ()]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles)), "a panel is named by its title in our checks"
    assert page["panels"][0]["type"] == "row"
    assert sum(panel["type"] == "row" for panel in page["panels"]) >= 3


@every_page
def test_descriptions_are_sentences_that_help(page: Json) -> None:
    for panel in lint.panels(page):
        assert len(panel["description"]) > 40, panel["title"]
        assert panel["description"].endswith("."), panel["title"]


@every_page
def test_series_are_named_by_labels_that_they_have(page: Json) -> None:
    """A legend's label must be one that the query keeps."""
    from dashboards.promql import selectors, substitute

    for panel, target in lint.targets(page):
        legend = target.get("legendFormat", "")
        wanted = {part.split("}}")[0].strip() for part in legend.split("{{")[1:]}
        for selector in selectors(substitute(target["expr"])):
            assert wanted - {"le"} <= selector.by, (panel["title"], legend)


@every_page
def test_every_variable_is_used(page: Json) -> None:
    text = json.dumps([page["panels"], page["annotations"], page["templating"]])
    for variable in page["templating"]["list"]:
        name = variable["name"]
        assert f"${name}" in text or f"${{{name}}}" in text, name


def test_changes_failures_and_alerts_are_marked() -> None:
    for uid, page in PAGES.items():
        marks = {one["name"]: one for one in page["annotations"]["list"]}
        assert marks["Changes"]["target"]["tags"] == ["afflux", "change"]
        assert marks["Failures"]["target"]["tags"] == ["afflux", "failure"]
        assert marks["Changes"]["datasource"]["uid"] == "-- Grafana --"
        assert ("Alerts" in marks) == (uid != "afflux-ray")


def test_provisioning_files_are_yaml_with_one_place_each() -> None:
    place = project_root() / "deploy" / "grafana" / "provisioning"
    source = yaml.safe_load((place / "datasources" / "prometheus.yml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"
    provider = yaml.safe_load((place / "dashboards" / "afflux.yml").read_text())
    assert provider["providers"][0]["options"]["path"] == "$AFFLUX_DASHBOARDS"
