"""``make demo``: starts the embedded model, asks it one thing over HTTP, and stops it again.

Runs the same commands that a user would type and shows each. Environment: KEEP=1 leaves the
deployment running, PORT is the port to use (8000), PROMPT replaces the question. Not a test: those
are in ``tests/e2e``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAME = "demo"
PROMPT = "Tell me about the sea."
MAX_TOKENS = 96


def main() -> int:
    """Run the demo. Returns the process's exit code."""
    port = os.environ.get("PORT", "8000")
    keep = os.environ.get("KEEP", "") not in ("", "0")
    started = time.monotonic()
    answered = False
    down = 0
    try:
        answered = _serve_and_ask(port)
        if not answered:
            _keep_logs()
    finally:  # whatever happens, the deployment is stopped
        if not (answered and keep):
            down = _afflux("down", "--name", NAME)
    if answered and keep:
        print(f"\nstill running: http://127.0.0.1:{port}/v1; stop it: afflux down --name {NAME}")
    seconds = time.monotonic() - started
    print(f"\n{'done' if answered else 'failed'} after {seconds:.0f} s")
    return 0 if answered and down == 0 else 1


def _serve_and_ask(port: str) -> bool:
    """Start the deployment, show one answer and the status. Whether there was an answer."""
    try:
        # A Ray of its own: what runs on this machine already is left alone.
        up = _afflux("up", "--address=local", "--name", NAME, "--set", f"frontend.port={port}")
        if up != 0:
            return False
        _say("a chat request with the OpenAI SDK")
        ask(f"http://127.0.0.1:{port}/v1", os.environ.get("PROMPT") or PROMPT)
        _afflux("status", "--name", NAME)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return False
    except Exception as error:
        print(f"\nthe request failed: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def ask(url: str, prompt: str) -> None:
    """Ask something over HTTP and print the answer while it comes.

    Args:
        url: of the API, with ``/v1``. prompt: of the user.

    Raises:
        OpenAIError: the request failed. RuntimeError: there was no text.
    """
    from openai import OpenAI

    keys = os.environ.get("AFFLUX_API_KEYS", "")
    client = OpenAI(base_url=url, api_key=keys.split(",")[0].strip() or "none", max_retries=0)
    model = client.models.list().data[0].id
    print(f"POST {url}/chat/completions  model={model} max_tokens={MAX_TOKENS} stream=true")
    print(f"user:      {prompt}\nassistant: ", end="", flush=True)
    began = time.monotonic()
    first = None
    tokens = 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=MAX_TOKENS,
        temperature=0.7,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        timeout=120,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    if first is None:
        raise RuntimeError("the answer holds no text")
    print(
        f"\n({tokens} tokens; first after {first - began:.2f} s, "
        f"all after {time.monotonic() - began:.2f} s)"
    )


def _afflux(*arguments: str) -> int:
    _say("afflux " + " ".join(arguments))
    return subprocess.run([sys.executable, "-m", "afflux", *arguments], check=False).returncode


def _say(text: str) -> None:
    print(f"\n$ {text}", flush=True)


def _keep_logs() -> None:
    """Copy the actors' logs away from what ``afflux down`` removes, and say where they are."""
    from cluster import records

    record = records.load(NAME)
    if record is None or record.ray is None:
        return  # it did not get that far; ``afflux up`` has said why
    kept = tempfile.mkdtemp(prefix="afflux-demo-logs-")
    for logs in Path(record.ray.folder).glob("**/session_latest/logs"):
        try:
            shutil.copytree(logs, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        except (OSError, shutil.Error) as error:  # some files may come and go
            print(f"not all logs could be copied: {error}", file=sys.stderr)
        print(f"logs of all actors: {kept}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
