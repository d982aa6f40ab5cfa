"""The live page: real requests against a server of this process, and the command in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import HOSTILE, Elements, rows_of, serving

import sharpscope as ss
from sharpscope.cli import _watch, main
from sharpscope.records.run_log import RunLog
from sharpscope.report.server import POLICY, Live, server
from sharpscope.studies._framework import run as study_run

ROOT = Path(__file__).parents[2]


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def state(port: int) -> dict[str, Any]:
    return dict(json.loads(ask(port, "/version")[1]))


def version(html: str) -> str:
    found = re.search(r'data-version="(\w+)"', html)
    assert found
    return found[1]


def test_a_run_that_grows(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "training")
    with serving(tmp_path) as port:
        html = ask(port)[1]
        assert "Waiting for the first measurement" in html
        assert state(port)["state"] == "waiting"
        log.append(step=0)
        assert state(port)["version"] != version(html)
        html = ask(port)[1]
        assert "<h1>1 rows</h1>" in html
        assert state(port) | {"age": 0} == {"version": version(html), "state": "running", "age": 0}
        log.append(step=1)
        assert state(port)["version"] != version(html)
        assert "<h1>2 rows</h1>" in ask(port)[1]


def test_silence_is_counted_from_the_last_change(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "training")
    log.append(step=0)
    changed = log.path.stat().st_mtime
    os.utime(log.path, (changed - 100, changed - 100))
    with serving(tmp_path) as port:
        assert 100 <= state(port)["age"] < 130
    os.utime(log.path, (changed + 100, changed + 100))  # the clock of a file server may be ahead
    with serving(tmp_path) as port:
        assert state(port)["age"] == 0


def test_a_page_is_made_once_per_version(tmp_path: Path) -> None:
    log, made = RunLog(tmp_path, "training"), []

    def make(directory: Path) -> str | None:
        made.append(directory)
        return rows_of(directory)

    log.append(step=0)
    with serving(tmp_path, make) as port:
        first = [ask(port)[1] for _ in range(3)]
        assert len(set(first)) == 1 and state(port)["version"] == version(first[0]) and len(made) == 1
        os.utime(log.path)  # touched, but the same: nobody needs to load it again
        assert ask(port)[1] == first[0] and state(port)["version"] == version(first[0])
        (tmp_path / "state.safetensors").touch()  # no part of the page
        before = len(made)
        ask(port)
        assert len(made) == before


def test_making_pages_takes_a_fraction_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = RunLog(tmp_path, "training"), [100.0]

    def make(directory: Path) -> str | None:
        now[0] += 2  # seconds
        return rows_of(directory)

    monkeypatch.setattr("sharpscope.report.server.time.monotonic", lambda: now[0])
    live = Live(tmp_path, make, lambda _: False)
    log.append(step=0)
    assert "1 rows" in live.view().html
    log.append(step=1)
    assert "1 rows" in live.view().html
    now[0] += 17.9
    assert "1 rows" in live.view().html
    now[0] += 0.2
    assert "2 rows" in live.view().html


def test_a_page_that_cannot_be_made_is_no_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "training")
    log.append(step=0)
    with log.path.open("ab") as file:
        file.write(f"{HOSTILE}\n".encode())
    with serving(tmp_path) as port:
        html = ask(port)[1]
        assert "cannot be shown at present" in html and "line 2 of" in html and "is damaged" in html
        log.path.write_bytes(b"")
        log.append(step=0)
        assert "1 rows" in ask(port)[1]
    with serving(tmp_path / "gone", lambda _: str(1 / 0)) as port:
        assert "division by zero" in ask(port)[1]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST:8000", "127.0.0.1:1"])
def test_this_machine_is_answered(host: str, tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        assert ask(port, Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "127.0.0.1:",
        "10.0.0.1",
        "",
        "a@localhost",
    ],
)
@pytest.mark.parametrize("path", ["/", "/version", "/other"])
def test_other_names_are_not_answered(host: str, path: str, tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        answer, body = ask(port, path, Host=host)
        assert answer.status == 403 and "<" not in body and "version" not in body


@pytest.mark.parametrize("lines", ["", "Host: localhost\r\nHost: evil.example\r\n"])
def test_the_host_is_named_once(lines: str, tmp_path: Path) -> None:
    with serving(tmp_path) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as plug:
        plug.sendall(f"GET / HTTP/1.0\r\n{lines}\r\n".encode())
        assert plug.makefile("rb").readline().split()[1] == b"403"


@pytest.mark.parametrize(
    "path",
    [
        *("/config.json", "/../etc/passwd", "/%2e%2e/", "/index.html", "/version/", "/version?x", "/?x", "/Version"),
        *("http://evil.example/", "*", "/training.jsonl", "/log/", "/."),
    ],
)
def test_nothing_else_is_served(path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with serving(tmp_path) as port:
        answer, body = ask(port, path, Host="localhost")
        assert (answer.status, body) == (404, "There is nothing here; the page is at /\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", HOSTILE.partition(" ")[0]])
def test_only_get_and_head_are_answered(method: str, tmp_path: Path) -> None:
    with serving(tmp_path) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as plug:
        plug.sendall(f"{method} / HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        said = plug.makefile("rb").read().decode()
        assert said.split()[1] == "501"
        assert POLICY in said and "<script" not in said.partition("\r\n\r\n")[2]


def test_headers_fit_the_page(tmp_path: Path) -> None:
    RunLog(tmp_path, "training").append(step=0)
    with serving(tmp_path) as port:
        for path, kind in (("/", "text/html"), ("/version", "application/json"), ("/no", "text/plain")):
            answer, body = ask(port, path)
            assert answer.headers["Content-Security-Policy"] == POLICY
            assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
            assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Server"].strip() == "sharpscope"
            assert "Access-Control-Allow-Origin" not in answer.headers
            head, nothing = ask(port, path, "HEAD")
            assert (head.status, head.headers["Content-Length"], nothing) == (
                answer.status,
                str(len(body.encode())),
                "",
            )
        html = ask(port)[1]
        assert "default-src" not in html  # the policy for files would keep the page from asking for its version
        tags = Elements(html).tags
        assert not [
            a
            for _, attrs in tags
            for a, v in attrs.items()
            if a in ("src", "href") and not (v or "").startswith(("#", "data:"))
        ]
        assert html.count("</body>") == 1 and html.index('id="watch"') < html.index("</body>")
    assert "'unsafe-inline'" in POLICY and "connect-src 'self'" in POLICY and "http" not in POLICY


def test_it_listens_to_this_machine_alone(tmp_path: Path) -> None:
    with server(Live(tmp_path, rows_of, lambda _: False)) as served:
        assert served.server_address[0] == "127.0.0.1"


def run(out: Path, *arguments: str) -> int:
    return main(["run", "tiny", "--quick", "--workers", "1", "--out", str(out), *arguments])


def test_a_study_is_shown_while_it_runs_and_when_it_is_done(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out) == 0
    whole = {path: path.read_bytes() for path in (out / "log").glob("*.jsonl")}
    done = {name: (out / name).read_bytes() for name in ("history.parquet", "report.html")}
    for path in (*whole, *map(out.joinpath, done), *out.glob("log/*.waits")):
        path.unlink()
    with serving(out, _watch.page, _watch.finished) as port:
        assert state(port)["state"] == "waiting" and "Waiting for the first measurement" in ask(port)[1]
        log = RunLog(out / "log", "descent").path
        log.write_bytes(b"".join(whole[log].splitlines(keepends=True)[:3]) + b'{"run": "desc')
        html = ask(port)[1]
        assert state(port)["state"] == "running"
        assert "Small things happen quickly" in html and "0 of 5 jobs are done" in html and 'id="chart-fit"' in html
        assert "Nothing is in the way" not in html
        before = sorted(p.name for p in out.rglob("*"))
        for path, content in whole.items():
            path.write_bytes(content)
        assert version(html) != state(port)["version"]
        html = ask(port)[1]
        assert "5 of 5 jobs are done" in html and state(port)["state"] == "running"
        assert before == sorted({p.name for p in out.rglob("*")} - {p.name for p in whole} | {log.name})  # only read
        for name, content in done.items():
            (out / name).write_bytes(content)
        assert state(port)["state"] == "finished"
        assert "Nothing is in the way" in ask(port)[1]


def test_a_study_directory_without_log_is_not_written(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"study": "tiny", "config": {}}))
    assert study_run.page(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("", "", "there is no directory"),
        ("thesis.tex", "", "holds no run (there is thesis.tex, and neither config.json nor monitor.json)"),
        ("config.json", '{"model_type": "bert"}', "config.json is not that of a run of sharpscope"),
        ("config.json", "not JSON", "config.json is not that of a run of sharpscope"),
        ("config.json", '{"study": "tyni", "config": {}}', "there is no study 'tyni'"),
    ],
)
def test_what_is_no_run_is_refused(
    name: str, content: str, sentence: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    if name:
        directory.mkdir()
        (directory / name).write_text(content)
    assert main(["watch", str(directory)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("sharpscope: ") and said.count("\n") == 1


def test_a_port_that_cannot_be_had_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (str(taken.getsockname()[1]), "99999"):
            assert main(["watch", str(tmp_path), "--port", port]) == 2
            said = capsys.readouterr().err
            assert f"port {port} cannot be had" in said and said.count("\n") == 1


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    command = [sys.executable, "-W", "error", "-c", "import sys; from sharpscope.cli import main; sys.exit(main())"]
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "watch", str(directory)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    found = re.fullmatch(r"(.+) is at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends this\)\n", process.stdout.readline())
    assert found and found[1] == str(directory)
    assert state(int(found[2]))["state"] == "waiting"
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=20)
    assert (process.returncode, complaints) == (0, "")
    assert said.strip() == f"no longer serving {directory}; the run itself is not touched"
    assert list(directory.iterdir()) == []


def test_a_monitored_run_is_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x = torch.randn(16, 4)
    f = ss.Objective(net, torch.nn.functional.mse_loss, [(x, x[:, :1])])
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with serving(tmp_path, _watch.page, _watch.finished) as port:
        assert state(port)["state"] == "waiting"
        with ss.Monitor(f, sgd, every=2, directory=tmp_path) as monitor:
            pages = []
            for _ in range(8):
                sgd.zero_grad()
                f.loss(net(x), x[:, :1]).backward()
                sgd.step()
                monitor.step()
                pages.append(ask(port)[1])
            assert state(port)["state"] == "running"
        assert state(port)["state"] == "finished"
    assert "Sharpness of this training run" in pages[0]
    assert len({version(html) for html in pages}) == 5  # with the rows of steps 0, 2, 4, 6, 8
