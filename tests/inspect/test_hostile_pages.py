"""What strangers can say in a dataset, and ask of the audit's server, reaches neither the terminal nor the disk."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import markdown
import pytest
from playwright.sync_api import Browser

from datapipe.inspect.audit import Questioning
from datapipe.inspect.audit_server import served
from datapipe.inspect.dataset_card import dataset_card
from datapipe.inspect.diff import diff, diff_page
from datapipe.inspect.report import report_page
from datapipe.schema import Reason, Slice, StageName
from datapipe.schema.table import SCHEMA_VERSION
from datapipe.shards import RUN_FILE, Provenance, Store, write_shard
from datapipe.status import STATUS_FILE
from tests.conftest import Sdd, kept_sample

ABUSES = {
    "reads a file": "row IN (SELECT 1 FROM read_csv('/etc/passwd'))",
    "reads a text": "key = (SELECT content FROM read_text('/etc/hostname'))",
    "reads bytes": "key = (SELECT content FROM read_blob('/etc/hostname'))",
    "reads a table by its name": "key IN (SELECT * FROM '/etc/passwd')",
    "lists a folder": "key IN (SELECT file FROM glob('/etc/*'))",
    "reads a URL": "row IN (SELECT 1 FROM read_csv('http://127.0.0.1:1/x'))",
    "reads the environment": "key = getenv('HOME')",
    "sees Python's variables": "row IN (SELECT 1 FROM secret)",
    "attaches": "true; ATTACH '{folder}/stolen.db'",
    "writes": "true; COPY sidecar TO '{folder}/stolen.csv'",
    "writes in place of a condition": "true) TO '{folder}/stolen.csv' --",
    "exports": "true; EXPORT DATABASE '{folder}/stolen'",
    "installs": "true; INSTALL httpfs",
    "loads": "true; LOAD '{folder}/evil.duckdb_extension'",
    "unlocks": "true; SET lock_configuration = false",
    "opens the way out": "true; SET enable_external_access = true",
    "looks for secrets": "key IN (SELECT name FROM duckdb_secrets(x := 1))",
    "defines": "true; CREATE TABLE t AS SELECT 1",
    "drops": "true; DROP VIEW sidecar",
    "calls": "true; PRAGMA database_list",
}


@pytest.fixture
def dataset(tmp_path: Path, provenance: Provenance) -> Path:
    folder = tmp_path / "dataset"
    rows = (hostile := kept_sample(0)).replace(caption="a mug", row=0), hostile.replace(row=1)
    write_shard(Store(str(folder)), "shard", Slice(0, rows), provenance)
    return folder


@pytest.mark.parametrize("abuse", ABUSES)
def test_a_condition_only_asks(refused: Callable[..., str], dataset: Path, tmp_path: Path, abuse: str) -> None:
    secret = dataset  # noqa: F841  (a Python variable, which SQL must not see)
    before = sorted(tmp_path.rglob("*"))
    assert "--where" in refused("inspect", dataset, "--where", ABUSES[abuse].format(folder=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


TERMINAL = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202egpj.exe\u2066 [bold red]x[/] [link=javascript:1]y[/link]"
"""Clears the screen, names the window, colors, goes back, turns around, and rich's own markup."""


def test_nothing_of_a_dataset_reaches_the_terminals_controls(sdd: Sdd, tmp_path: Path, provenance: Provenance) -> None:
    kept = kept_sample(0)
    lost = kept.replace(row=1, image=None, url=TERMINAL).failed(StageName.FETCH, Reason.ERROR, TERMINAL)
    hostile = kept.replace(alt_text=TERMINAL, licence=TERMINAL, url=TERMINAL, caption_model=TERMINAL)
    write_shard(Store(str(tmp_path)), "shard", Slice(0, (hostile, lost)), provenance)
    ways = (("--where", "true"), ("--candidates",), ("--sample", "0000000000"), ("--random", "2"), ())
    for words in (*(("inspect", tmp_path, *way) for way in ways), ("inspect", tmp_path, "--where", TERMINAL)):
        _, printed, error = sdd(*words)
        assert printed or error
        assert not set("\x1b\x07\x9b\r\b\u202e\u2066") & set(printed + error), words
        assert "[bold red]" in printed + error or words[2:] in ((), ("--candidates",)), words


def test_pages_turn_nothing_around(opened: Any, tmp_path: Path, provenance: Provenance) -> None:
    turned = kept_sample(0).replace(licence="\u202eevil", alt_text="\u202eevil")
    write_shard(Store(str(tmp_path / "set")), "shard", Slice(0, (turned,)), provenance)
    page = opened(report_page(Store(str(tmp_path / "set"))))
    for kind in ("a", "b", "code", "span", "td", "th", "option"):
        for style in page.locator(kind).evaluate_all("nodes => nodes.map(n => getComputedStyle(n).unicodeBidi)"):
            assert style in ("isolate", "plaintext", "isolate-override"), kind


SCRIPT = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7777 * 7777 }}\"'>\u202e"
LINK = f"javascript:window.hacked=1//{SCRIPT}"


def written_by_a_stranger(folder: Path, provenance: Provenance, name: str) -> Store:
    """A dataset of two rows, one of which only "A" keeps, with scripts wherever there is a text."""
    entity = dataclasses.replace(kept_sample(0).candidates[0], tag=SCRIPT + name)
    hostile = kept_sample(0).replace(
        caption=SCRIPT + name, alt_text=SCRIPT, licence=SCRIPT, url=LINK, caption_model=SCRIPT, candidates=(entity,)
    )
    other = hostile.replace(row=1)
    if name != "A":
        other = other.replace(image=None).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES, SCRIPT + TERMINAL)
    store = Store(str(folder / name))
    write_shard(store, "shard", Slice(0, (hostile, other)), provenance)
    run = {
        "schema_version": SCHEMA_VERSION,
        "parts": [{"rows": 2, "input": "the same"}],
        "models": {"caption": SCRIPT + TERMINAL + name},
        "recipe": {"caption.prompt": SCRIPT + TERMINAL + name},
    }
    store.put(RUN_FILE, json.dumps(run).encode())
    return store


def test_nothing_of_a_status_reaches_the_terminals_controls(sdd: Sdd, tmp_path: Path, provenance: Provenance) -> None:
    store = written_by_a_stranger(tmp_path, provenance, "A")
    store.put(STATUS_FILE, json.dumps({"told_at": 0.0, "step": TERMINAL}).encode())
    code, printed, error = sdd("status", store.root)
    assert code == 0, error
    assert "[bold red]" in printed
    assert not set("\x1b\x07\x9b\r\b\u202e\u2066") & set(printed)


def assert_harmless(page: Any) -> None:
    assert "window.hacked" in page.locator("body").inner_text()  # as a text
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("a").evaluate_all("links => links.filter(a => a.protocol === 'javascript:').length") == 0
    assert "60481729" not in page.locator("body").inner_text().replace("{{ 7777 * 7777 }}", "")


def test_the_page_of_a_difference_runs_nothing(opened: Any, sdd: Sdd, tmp_path: Path, provenance: Provenance) -> None:
    a, b = (written_by_a_stranger(tmp_path, provenance, name) for name in "AB")
    page = opened(diff_page(a, b, diff(a, b)))
    for card in page.locator(".card").all():
        card.click()
        assert_harmless(page)
        page.keyboard.press("Escape")
    assert page.locator(".card").count() == 3
    code, printed, error = sdd("diff", a.root, b.root)
    assert code == 0, error
    assert "window.hacked" in printed
    assert not set("\x1b\x07\x9b\r\b\u202e\u2066") & set(printed)


def test_the_page_of_an_audit_runs_nothing(browser: Browser, tmp_path: Path, provenance: Provenance) -> None:
    asks = Questioning(written_by_a_stranger(tmp_path, provenance, "A"), 2, 0)
    with served(asks.page, asks.receive) as (address, _):
        page = browser.new_page()
        page.goto(address)
        for _ in asks.asked:
            assert page.evaluate("window.hacked") is None
            with page.expect_response("**/marks"):
                page.keyboard.press("ArrowRight")
        assert page.locator("img[src=x]").count() == 0
        page.close()


def test_a_card_runs_nothing_even_where_no_hub_cleans_it(opened: Any, tmp_path: Path, provenance: Provenance) -> None:
    card = dataset_card(written_by_a_stranger(tmp_path, provenance, "A"))
    page = opened(markdown.markdown(card, extensions=["tables", "fenced_code"]))
    assert_harmless(page)


@pytest.fixture
def audit() -> Iterator[tuple[str, list[Any]]]:
    """The address of a page that is served, and what it received."""
    received: list[Any] = []
    with served(lambda: "<p>page</p>", received.append) as (address, _):
        yield address, received


def answered(address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
    host = address.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=10)
    given = {"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_audits_server_listens_to_its_own_page_alone(audit: tuple[str, list[Any]]) -> None:
    address, received = audit
    host, secret = address.split("/")[2], address.split("/")[3]
    marks, mark = f"/{secret}/marks", b'{"a": true}'
    assert address.startswith("http://127.0.0.1:")
    assert answered(address, f"/{secret}/") == 200
    json_type = {"Content_Type": "application/json"}
    refused = {
        "another name": answered(address, f"/{secret}/", Host="evil.example"),
        "a name that leads here": answered(address, f"/{secret}/", Host=host.replace("127.0.0.1", "localhost")),
        "no secret": answered(address, "/"),
        "another secret": answered(address, f"/{secret[::-1]}/"),
        "a way up": answered(address, f"/{secret}/../../etc/passwd"),
        "a way up, hidden": answered(address, f"/{secret}/%2e%2e/%2e%2e/etc/passwd"),
        "a file": answered(address, f"/{secret}/etc/passwd"),
        "another page": answered(address, marks, "POST", mark, Origin="http://evil.example", **json_type),
        "no page": answered(address, marks, "POST", mark, Origin="null", **json_type),
        "a form": answered(address, marks, "POST", mark, Content_Type="text/plain"),
        "too much": answered(address, marks, "POST", mark, Content_Length=str(1 << 40), **json_type),
        "less than nothing": answered(address, marks, "POST", mark, Content_Length="-1", **json_type),
        "no JSON": answered(address, marks, "POST", b"\xff", **json_type),
        "a depth without end": answered(address, marks, "POST", b"[" * 100_000, **json_type),
        "another method": answered(address, marks, "DELETE"),
    }
    assert set(refused.values()) <= {400, 404, 413, 501}, refused
    assert received == []
    assert answered(address, marks, "POST", mark, Origin=f"http://{host}", **json_type) == 200
    assert received == [json.loads(mark)]


def test_the_audits_server_is_not_there_for_the_network(audit: tuple[str, list[Any]]) -> None:
    port = int(audit[0].split("/")[2].partition(":")[2])
    for family, place in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as asked, pytest.raises(OSError):  # noqa: PT011  (refused, or no such network)
            asked.connect((place, port))


def test_an_error_of_a_file_name_is_one_plain_line(sdd: Sdd, tmp_path: Path) -> None:
    code, _, error = sdd("inspect", tmp_path / "\x1b[2J\u202e")
    assert code == 2
    assert error.count("\n") == 1
    assert not set("\x1b\u202e") & set(error)
