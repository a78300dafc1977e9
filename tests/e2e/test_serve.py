"""`baton serve` from outside: it comes up, answers, says what its processes are, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from ipaddress import ip_address
from pathlib import Path

import httpx
import psutil
import pytest

from baton.deploy import models
from tests.e2e.conftest import KEY, Start
from tests.e2e.serving import Serve, eventually, gone

QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "temperature": 0,
}
ONE_WORKER = ("--colocated", "1", "--threads", "1")
"""With a thread for each core it would wait for those that other tests keep busy."""
STREAM = {"model": "demo", "prompt": "Count: one, two, three,", "temperature": 0, "stream": True, "ignore_eos": True}


def ask(serve: Serve) -> str:
    reply = httpx.post(f"{serve.url}/v1/chat/completions", json=QUESTION, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_it_answers(demo: Serve) -> None:
    assert ask(demo) == "The capital of France is Paris."


def test_the_curl_line_that_it_prints_works(demo: Serve) -> None:
    line = next(line for line in demo.output.splitlines() if line.startswith("curl "))
    done = subprocess.run([*shlex.split(line), "-sS"], capture_output=True, text=True, timeout=60)
    assert "Paris" in done.stdout, done


def test_every_process_says_what_it_is(demo: Serve) -> None:
    assert demo.children().keys() == {"controller", "gateway-0", "prefill-0", "decode-0"}
    shown = subprocess.run(
        ["ps", "-o", "args=", "-p", str(demo.process.pid)], capture_output=True, text=True, timeout=10
    )
    assert shown.stdout.strip() == "baton serve"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_running_gateway_holds_no_torch_and_the_workers_no_web_framework(demo: Serve) -> None:
    children = demo.children()
    files = {name: {m.path for m in p.memory_maps()} for name, p in children.items()}
    assert not [path for path in files["gateway-0"] if "libtorch" in path]
    for worker in ("prefill-0", "decode-0"):
        assert [path for path in files[worker] if "libtorch" in path]
        assert not [path for path in files[worker] if "pydantic_core" in path]


def test_worker_ports_are_on_loopback_only(demo: Serve) -> None:
    for process in [*demo.children().values(), psutil.Process(demo.process.pid)]:
        listening = [c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in listening)


def test_sigterm_finishes_what_has_begun_and_leaves_nothing(start: Start) -> None:
    serve = start(*ONE_WORKER).wait_ready()
    with httpx.stream("POST", f"{serve.url}/v1/completions", json=STREAM | {"max_tokens": 24}, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        serve.signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert serve.wait() == 0


def test_a_second_ctrl_c_does_not_wait(start: Start) -> None:
    serve = start(*ONE_WORKER).wait_ready()
    with httpx.stream("POST", f"{serve.url}/v1/completions", json=STREAM | {"max_tokens": 2000}, timeout=60) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
        began = time.monotonic()
        serve.signal(signal.SIGINT)
        eventually(lambda: "draining" in serve.output, "it drains")
        serve.signal(signal.SIGINT)
        serve.wait()
        assert time.monotonic() - began < 30, "the drain alone may take that long"


@pytest.mark.parametrize("when", ["loading", "serving"])
def test_kill_9_leaves_no_process(start: Start, when: str) -> None:
    serve = start()
    if when == "serving":
        serve.wait_ready()
    eventually(lambda: len(serve.children()) == 4, f"four processes\n{serve.output}", 60)
    serve.signal(signal.SIGKILL)
    assert serve.wait() == -signal.SIGKILL


def test_a_worker_that_dies_is_back_soon(demo: Serve) -> None:
    old = demo.children()["decode-0"]
    old.kill()
    eventually(lambda: gone(old) and "decode-0" in demo.children(), "a new decode-0", 30)

    def ready() -> bool:
        return httpx.get(f"{demo.url}/ready", timeout=10).status_code == 200

    eventually(ready, f"ready again\n{demo.output}", 60)
    assert ask(demo) == "The capital of France is Paris."


def test_a_model_that_cannot_be_loaded_ends_the_start_with_the_reason(
    demo: Serve, start: Start, tmp_path: Path
) -> None:
    gguf = models.find("demo").gguf
    assert gguf is not None
    shutil.copytree(models.cached_folder(gguf), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Perceptron"]}))
    serve = start(str(tmp_path / "model"))
    assert serve.wait(120) == 1
    assert "cannot be kept running (exit code 78)" in serve.output.splitlines()[-1]
    assert "Perceptron" in serve.output.splitlines()[-1]


def test_keys_come_from_the_environment_and_are_not_shown(pair_serve: Serve) -> None:
    chat = f"{pair_serve.url}/v1/chat/completions"
    assert httpx.post(chat, json=QUESTION, timeout=60).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(chat, json=QUESTION, headers=headers, timeout=60).status_code == 200
    assert KEY not in pair_serve.output
    line = next(line for line in pair_serve.output.splitlines() if line.startswith("curl "))
    environment = os.environ | {"BATON_API_KEY": KEY}
    done = subprocess.run(f"{line} -sS", shell=True, capture_output=True, text=True, timeout=60, env=environment)
    assert "Paris" in done.stdout, done
