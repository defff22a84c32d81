"""Load the page's server: 200 clients send drawings without a pause, for a minute.

    python benchmarks/serve.py                                   one client, then 200, with and without batches
    python benchmarks/serve.py --clients 50 --seconds 10 --batch 16
    python benchmarks/serve.py --clients --page 5           from the stroke to the answer on the page, in a browser

Every client sends a drawing, reads the answer and sends the next drawing. All clients are one process on the same
machine, which shares the cores with the server. Clients on another machine would get more predictions per second. The
right answer to a drawing has status 200 and the digit of its first answer. Any other answer counts as an error. The
memory is that of the server, read four times per second (Linux). On a busy machine, compare the cores used by server
and clients and the core time per prediction. Other work changes these two figures less than predictions per second.

--page draws each of the ten digits N times on the page, in headless Chromium with sixty mouse moves per second. It
reports the time that the page measures, from the browser's time stamp of a move until the answer that includes this
move is on the page. It needs Playwright and a browser.
"""

import argparse
import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from checkout import environment
from turns import conditions, processes

SHAPES = {  # arcs (centre x, y, radius x, y, from, to in degrees) and lines of each digit, in a square of side 1
    0: [("arc", 0.5, 0.5, 0.22, 0.32, 0, 360)],
    1: [("line", 0.52, 0.15, 0.5, 0.85)],
    2: [("arc", 0.5, 0.35, 0.2, 0.18, -160, 40), ("line", 0.65, 0.47, 0.3, 0.82), ("line", 0.3, 0.82, 0.72, 0.8)],
    3: [("arc", 0.48, 0.34, 0.17, 0.17, -140, 90), ("arc", 0.48, 0.66, 0.2, 0.17, -90, 140)],
    4: [("line", 0.4, 0.15, 0.28, 0.55), ("line", 0.28, 0.55, 0.75, 0.55), ("line", 0.6, 0.3, 0.58, 0.88)],
    5: [("line", 0.68, 0.18, 0.38, 0.2), ("line", 0.38, 0.2, 0.36, 0.46), ("arc", 0.46, 0.63, 0.2, 0.19, -120, 140)],
    6: [("line", 0.6, 0.13, 0.36, 0.6), ("arc", 0.5, 0.66, 0.15, 0.17, -200, 170)],
    7: [("line", 0.28, 0.2, 0.72, 0.2), ("line", 0.72, 0.2, 0.45, 0.85)],
    8: [("arc", 0.5, 0.33, 0.14, 0.16, 90, 450), ("arc", 0.5, 0.67, 0.18, 0.18, -90, 270)],
    9: [("arc", 0.48, 0.35, 0.17, 0.17, 0, 360), ("line", 0.65, 0.35, 0.6, 0.87)],
}


def drawing(digit, rng=None, points=24):
    """Return the strokes of `digit`, lists of [x, y] from 0 to 1. `rng` tilts, moves and resizes them at random."""
    strokes = []
    for kind, *numbers in SHAPES[digit]:
        along = np.linspace(0, 1, points)
        if kind == "line":
            x0, y0, x1, y1 = numbers
            line = np.stack([x0 + (x1 - x0) * along, y0 + (y1 - y0) * along], axis=1)
        else:
            x, y, rx, ry, start, stop = numbers
            angle = np.radians(start + (stop - start) * along)
            line = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)
        strokes.append(line)
    if rng is not None:
        size, shift, tilt = rng.uniform(0.6, 1), rng.uniform(-0.1, 0.1, 2), math.radians(rng.uniform(-8, 8))
        turn = size * np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        strokes = [np.clip((line - 0.5) @ turn.T + 0.5 + shift, 0, 1) for line in strokes]
    return [line.round(4).tolist() for line in strokes]


BROWSER_FLAGS = [
    "--no-sandbox",  # Chromium's sandbox refuses root, which is the usual user in a container
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser():
    """Return the path of Chromium or Chrome from TINYVIT_BROWSER or the PATH, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("TINYVIT_BROWSER") or next(filter(None, map(shutil.which, names)), None)


def draw_with_mouse(page, strokes, up=True, pause=0.0):
    """Draw on a Playwright page. up: lift the pen at the end; pause: seconds between two moves."""
    page.locator("#ink").scroll_into_view_if_needed()
    box = page.locator("#ink").bounding_box()
    for number, stroke in enumerate(strokes):
        for place, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if place == 0:
                page.mouse.down()
            time.sleep(pause)
        if up or number < len(strokes) - 1:
            page.mouse.up()


def stroke_to_answer(server, times):
    """Draw every digit `times` times in a browser, and return the times of the answers, a dict."""
    from playwright.sync_api import sync_playwright  # imported here because only this function needs it

    with sync_playwright() as playwright:
        path = find_browser() or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.goto(f"http://127.0.0.1:{server.port}")
        page.wait_for_selector(".sample")
        page.evaluate(
            """() => { window.found = []; const shown = document.getElementById("latency");
                       new MutationObserver(() => { const text = shown.textContent.match(/\\d+/);
                                                    if (text) window.found.push(Number(text[0])); })
                       .observe(shown, { childList: true }); }"""
        )
        draw_with_mouse(page, drawing(0))  # a warm-up
        page.wait_for_timeout(500)
        page.evaluate("window.found.length = 0")
        right, moves = 0, 0
        for digit in [*range(10)] * times:
            page.click("#clear")
            strokes = drawing(digit)
            moves += sum(map(len, strokes))
            draw_with_mouse(page, strokes, pause=1 / 60)
            page.wait_for_timeout(300)
            right += page.inner_text("#digit") == str(digit)
        found = page.evaluate("window.found")
        browser.close()
    return {
        "drawings": 10 * times,
        "read_rightly": right,
        "moves": moves,
        "answers": len(found),
        "milliseconds": spread(found),
    }


def spread(milliseconds):
    percentiles = np.percentile(np.array(milliseconds), [50, 90, 99, 100]).round(1).tolist()
    return dict(zip(["median", "p90", "p99", "most"], percentiles, strict=True))


class Server:
    """The page's server in a separate process."""

    def __init__(self, *flags):
        command = [sys.executable, "-m", "tinyvit", "serve", "--no-browser", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        line = self.process.stdout.readline()
        if "http://" not in line:
            self.process.kill()
            raise SystemExit(f"the server did not start; expected a line with its URL, got {line!r}")
        self.port = int(line.split("http://")[1].split(",")[0].rsplit(":", 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()

    def megabytes(self):
        """Return the current memory of the server in megabytes, or 0 without /proc."""
        return sum(now for now, _ in processes(str(self.process.pid)).values())

    def busy_seconds(self):
        """Return the CPU time of the server in seconds, or NaN without /proc."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time


async def exchange(reader, writer, request):
    """Send a request and return the status and the body of the response."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


def request_for(strokes):
    body = json.dumps({"strokes": strokes}).encode()
    head = "POST /api/predict/strokes HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def client(port, work, until, latencies, errors):
    """Send requests until the time `until`. work: pairs of a request and the expected start of its response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    turn = len(work) // 2
    try:
        while time.monotonic() < until:
            request, expected = work[turn % len(work)]
            turn += 1
            began = time.perf_counter()
            status, body = await asyncio.wait_for(exchange(reader, writer, request), 30)
            latencies.append(time.perf_counter() - began)
            if status != 200 or not body.startswith(expected):
                errors.append(f"{status}: {body[:80]!r}, expected {expected!r}")
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, IndexError) as error:
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


async def crowd(server, clients, seconds):
    """Run the clients at the same time for `seconds`, and return the record, a dict."""
    rng = np.random.default_rng(0)
    requests = [request_for(drawing(i % 10, rng)) for i in range(50)]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answers = [(await exchange(reader, writer, request))[1] for request in requests]
    writer.close()
    work = [(request, answer.split(b",")[0]) for request, answer in zip(requests, answers, strict=True)]
    if not all(expected.startswith(b'{"digit":') for _, expected in work):
        raise SystemExit(f"expected a digit from the server, got {answers[0][:200]!r}")
    right = sum(int(expected.split(b":")[1]) == i % 10 for i, (_, expected) in enumerate(work))

    latencies, errors, memory = [], [], [server.megabytes()]
    others = os.getloadavg()[0]  # before the clients start
    began, busy, own = time.monotonic(), server.busy_seconds(), time.process_time()
    places = [work[i % 50 :] + work[: i % 50] for i in range(clients)]  # every client starts with another drawing
    tasks = [
        asyncio.create_task(client(server.port, place, began + seconds, latencies, errors)) for place in places
    ]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.25)
        memory.append(server.megabytes())
    took = time.monotonic() - began
    await asyncio.gather(*tasks)
    busy, own = server.busy_seconds() - busy, time.process_time() - own
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "predictions": len(latencies),
        "errors": len(errors),
        "first_errors": errors[:5],
        "predictions_per_second": round(len(latencies) / took),
        "milliseconds": spread(1e3 * np.array(latencies)),
        "milliseconds_of_a_core_each": {
            "server": round(1e3 * busy / len(latencies), 2),
            "client": round(1e3 * own / len(latencies), 2),
        },
        "cores_had": {"server": round(busy / took, 2), "clients": round(own / took, 2)},
        "load_average_before": round(others, 1),
        "server_megabytes": {
            "before": round(memory[0]), "most": round(max(memory)), "after": round(memory[-1])
        },
        "drawings_read_rightly": f"{right} of {len(work)}",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clients", type=int, nargs="*", default=[1, 200], metavar="N", help="numbers of clients (1 200)")
    add("--seconds", type=float, default=60, metavar="X", help="time per number of clients (60)")
    add("--batch", type=int, nargs="+", default=[16, 1], metavar="N", help="the server's --batch (16 1)")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    add("--page", type=int, default=0, metavar="N", help="draw every digit N times in a browser (0)")
    options = parser.parse_args()
    records = []
    for batch in options.batch:
        with Server("--batch", str(batch)) as server:
            for clients in options.clients:
                record = {"batch": batch, **asyncio.run(crowd(server, clients, options.seconds))}
                records.append(record)
                times = ", ".join(f"{name} {value:g} ms" for name, value in record["milliseconds"].items())
                cost, memory = record["milliseconds_of_a_core_each"]["server"], record["server_megabytes"]["most"]
                had = sum(record["cores_had"].values())
                print(
                    f"batch {batch:2d}, {clients:3d} clients: {record['predictions_per_second']:,} predictions/s, "
                    f"{times}, {cost} ms of core time each, {record['errors']} errors, at most {memory} MB, "
                    f"{had:.1f} cores used",
                    flush=True,
                )
    page = None
    if options.page:
        with Server() as server:
            page = stroke_to_answer(server, options.page)
        print(f"from the stroke to the answer on the page: {page}")
    if options.json:
        found = {"conditions": conditions("fastapi", "uvicorn", "pillow"), "records": records, "page": page}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(record["errors"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
