"""The dashboard and the alerts in `deploy` use only metrics that the API, on real servers, exports."""

import json
import re

import yaml

from tests.running import ROOT


def named(expressions):
    found = {name for text in expressions for name in re.findall(r"headrace_[a-z_]+", text)}
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


def test_the_dashboard_and_the_alerts_name_figures_that_exist(live):
    live.http.get("/healthz")
    told = set(re.findall(r"^# TYPE (headrace_[a-z_]+)", live.http.get("/metrics").text, re.MULTILINE))
    board = json.loads((ROOT / "deploy" / "dashboard.json").read_text())
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
    shown = named(target["expr"] for panel in board["panels"] for target in panel["targets"])
    watched = named(rule["expr"] for rule in rules)
    assert shown
    assert watched
    assert (shown | watched) - told == set()
    assert all(rule["annotations"]["summary"] and rule["annotations"]["description"] for rule in rules)
