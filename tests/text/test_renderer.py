"""Templates that take too much, and the life of the process that renders them."""

import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastdeploy.text import renderer
from fastdeploy.text.chat_template import render
from fastdeploy.text.renderer import RENDERER

HI = [{"role": "user", "content": "Hi"}]
TIME, MEMORY, LENGTH = "takes longer than 0.5 s", "takes more than 1024 MiB of memory", "writes more than 16777216 char"
DEEP = "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}TEXT{% endfor %}{% endfor %}"


def hello():
    return render("{{ messages[0].content }}!", HI, {})


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        (LOOPS.replace("TEXT", ""), TIME),
        (LOOPS.replace("TEXT", "{{ 'a' * 999 }}"), LENGTH),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", TIME),
        (DEEP + DEEP.replace("ns", "other") + "{{ ns.x == other.x }}", TIME),
        (DEEP + "{{ ns.x }}", TIME),
        ("{% set ns = namespace(x=3) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", TIME),
        ("{{ 5 | round(10**9, 'ceil') }}", TIME),
        ("{{ lipsum(n=10**9) }}", TIME),
        ("{{ 'a' * 10**10 }}", MEMORY),
        ("{{ messages[0].content * 10**10 }}", MEMORY),
        ("{{ '{:>9999999999}'.format(1) }}", MEMORY),
        ("{{ 'a' | center(10**10) }}", MEMORY),
        ("{{ 'a' | indent(10**10, true) }}", MEMORY),
        ("{{ (5).to_bytes(10**11, 'big') }}", MEMORY),
        ("{{ [0] | batch(10**11, 1) | list }}", MEMORY),
        ("{{ messages | tojson(indent=10**9) }}", MEMORY),
        ("{{ 'a' * (2**24 + 1) }}", LENGTH),
    ],
)
def test_a_template_that_takes_too_much_is_stopped(monkeypatch, template, limit):
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.5 if limit is TIME else 60)
    with pytest.raises(ValueError, match=f"the chat template {limit}"):
        render(template, HI, {})
    monkeypatch.undo()
    assert hello() == "Hi!"


def test_a_text_within_the_limits_is_rendered_whole():
    assert render("{{ 'ab' * 2**23 }}", HI, {}) == "ab" * 2**23


def test_a_template_that_ends_the_process_is_a_value_error(monkeypatch):
    hello()
    monkeypatch.setattr(RENDERER, "_exchange", lambda request: None)
    with pytest.raises(ValueError, match="crashes the process"):
        hello()


def test_a_process_that_was_killed_meanwhile_is_replaced():
    hello()
    os.kill(RENDERER._process.pid, signal.SIGKILL)
    RENDERER._process.wait()
    assert hello() == "Hi!"


def test_an_interrupted_request_leaves_no_answer_to_the_next(ctrl_c):
    hello()
    main = threading.main_thread().ident
    interrupt = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        render(LOOPS.replace("TEXT", ""), HI, {})
    interrupt.join()
    assert hello() == "Hi!"


def test_threads_get_their_own_answers():
    wrong = []

    def work(name):
        for turn in range(50):
            text = f"{name}.{turn}"
            if render("{{ messages[0].content }}", [{"role": "user", "content": text}], {}) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_has_a_process_of_its_own():
    hello()
    pid = RENDERER._process.pid
    child = os.fork()
    if child == 0:
        is_own = hello() == "Hi!" and RENDERER._process.pid != pid
        RENDERER.end()
        os._exit(0 if is_own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert hello() == "Hi!" and RENDERER._process.pid == pid


def test_the_process_ends_with_the_one_that_started_it():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        hello()
        os.write(writer, str(RENDERER._process.pid).encode())
        os._exit(0)  # without any cleaning up
    os.waitpid(child, 0)
    pid = int(os.read(reader, 100))
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    os.close(reader)
    os.close(writer)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-"])
def test_a_program_without_standard_streams_renders(tmp_path, streams):
    program = "from tests.text.test_renderer import hello; open('answer', 'w').write(hello())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(f"{sys.executable} -c {program!r} {streams}", shell=True, cwd=tmp_path, env=environment, timeout=60)
    assert (tmp_path / "answer").read_text() == "Hi!"


def test_the_process_has_the_same_package_as_the_program_that_starts_it(tmp_path):
    (tmp_path / "fastdeploy").mkdir()
    (tmp_path / "fastdeploy" / "__init__.py").write_text("raise ImportError")
    program = f"""
import os, sys
from tests.text.test_renderer import hello
os.chdir({str(tmp_path)!r})  # where "" leads now
sys.path.insert(0, {str(tmp_path)!r})
print(hello())
"""
    root = Path(renderer.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "Hi!\n", ended.stderr


def test_a_program_with_a_limit_of_memory_renders():
    program = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); "
    program += "from fastdeploy.text.renderer import RENDERER; "
    program += """print(RENDERER.ask(b'{"source": "{{ 1 }}", "messages": null}'))"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.stdout == "{}\n", ended.stderr


@pytest.fixture
def executable():
    """What the process is started with, set for one test."""
    RENDERER.end()
    before = multiprocessing.spawn.get_executable()
    yield multiprocessing.set_executable
    multiprocessing.set_executable(os.fsdecode(before))


@pytest.mark.parametrize(
    ("path", "why"), [("/nowhere/python", "No such file"), ("/bin/false", "it ended at once"), ("", ".*"), (None, ".*")]
)
def test_a_process_that_does_not_start_is_a_runtime_error(executable, path, why):
    executable(path)
    message = rf"{path or ''}' did not start the process that renders chat templates \(.*{why}.*set_executable"
    with pytest.raises(RuntimeError, match=message):
        hello()


def test_a_program_that_is_no_python_may_name_one(executable, monkeypatch):
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/bin/false")
    executable(python)
    assert hello() == "Hi!"
