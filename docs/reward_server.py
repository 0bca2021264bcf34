"""An example of a server for `--reward http`: python docs/reward_server.py --port 8000

It needs only the standard library. Replace `score` by a reward of your own. docs/rewards.md describes the protocol.
"""

import argparse
import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(images: list[bytes], prompts: list[str], metadata: list) -> list[float]:
    """A number for each image, which is the content of a PNG file. Here: simple images, whose files are small."""
    return [-len(image) / 1000 for image in images]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            request = json.loads(body)
            images = [base64.b64decode(image) for image in request["images"]]
            status, answer = 200, {"scores": score(images, request["prompts"], request["metadata"])}
        # the client shows the error to whoever trains
        except Exception as error:
            status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 chooses a free one")
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
