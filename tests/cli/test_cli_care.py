"""`lori rm`, `gc`, `doctor`, `db journal`, and what `log` and `show` make of removed versions."""

import json


def test_a_removed_adapter_goes_from_sight_is_freed_and_stays_told(trained):
    assert trained("rm", "main@1", "--reason", "too weak").stdout == "main@1 removed\n"
    assert "main@1" not in trained("log").stdout
    assert "main@1" in trained("log", "--removed").stdout
    shown = trained("show", "main@1").stdout
    assert "too weak" in shown
    assert trained.json("show", "main@1")["record"]["hidden"] is True
    refused = trained.refuses("export", "main@1", trained.folder / "out", code=4)
    assert "main@1 was removed by" in refused
    assert "`lori rm --undo main@1`" in refused
    assert trained.json("gc") == []  # a day of grace
    (told,) = trained.json("gc", "--dry-run", "--grace", "0")
    assert (told["kind"], told["subject"]) == ("removed", "main@1")
    assert "would free 1 item" in trained("gc", "--dry-run", "--grace", "0").stdout
    assert trained("rm", "--undo", "main@1").stdout == "main@1 is back\n"
    assert trained.json("gc", "--grace", "0") == []
    trained("rm", "main@1")
    assert "freed 1 item" in trained("gc", "--grace", "0").stdout
    assert "is missing" in trained.refuses("rm", "--undo", "main@1", code=8)
    assert trained.json("verify") == []


def test_what_a_merge_needs_is_refused_in_one_line(trained):
    refused = trained.refuses("rm", "colour@1", code=10)
    assert "colour@1 is needed by main@1, which was merged from it" in refused
    assert len(trained.json("log")) == 3


def test_log_lists_the_newest_and_says_that_there_are_more(trained):
    result = trained("log", "--last", "2", "--json")
    assert [adapter["ref"] for adapter in json.loads(result.stdout)] == ["shape@1", "main@1"]
    assert "the newest 2; more with --last N, all with --last 0" in result.stderr
    assert len(trained.json("log", "--last", "0")) == 3
    assert trained("log", "--last", "3").stderr == ""


def test_doctor_ends_with_13_where_something_needs_mending(lori):
    found = {check["name"]: check["state"] for check in lori.json("doctor")}
    assert "trouble" not in found.values()
    (lori.folder / ".lori" / "objects").chmod(0o755)
    result = lori("doctor", code=13)
    assert "chmod 700" in result.stdout
    assert result.stderr == "lori: needs mending: permissions\n"
    (lori.folder / ".lori" / "registry.db").unlink()
    assert {c["state"] for c in lori.json("doctor", code=13) if c["name"] == "database"} == {
        "trouble"
    }


def test_the_journal_is_shown_and_only_known_ones_are_set(lori):
    assert lori("db", "journal").stdout == "the journal is rollback\n"
    assert lori.json("db", "journal", "rollback") == {"journal": "rollback"}
    assert "there are: rollback, wal" in lori.refuses("db", "journal", "memory", code=2)


def test_verify_decodes_adapters_where_that_is_asked_for(trained):
    from lori_manager.records import NewAdapter
    from lori_manager.workspace import Workspace

    with Workspace.open(trained.folder) as ws:
        base = ws.store.base().fingerprint
        new = NewAdapter("odd", "trained", None, None, None, (), "lori-s", 4, None, base)
        ws.store.add_adapter(new, b"nothing that lori ever wrote")
    assert trained.json("verify") == []
    found = trained.json("verify", "--deep", code=8)
    assert [(f["kind"], f["subject"]) for f in found] == [("damaged", "odd@1")]
