"""Laws of the hub's two commands: hf:NAME is a source from the cache or over the network, and a
pushed export comes back byte for byte.

The client is huggingface_hub's own, in processes of its own since it reads its settings once; the
hub is a small server here.
"""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from jaxpt.model import transformer
from jaxpt.weights import hub, huggingface

ASK = """
import sys
from jaxpt.spec import UserError
from jaxpt.weights import hub
for source in sys.argv[1:]:
    try:
        print("IS", hub.download_model(source))
    except UserError as error:
        print("NO", error)
"""


class Hub(http.server.ThreadingHTTPServer):
    """What of the hub's protocol the client needs to fetch a model, and to make a repository and
    upload into it (LFS and commits).
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[
            str, dict[str, dict[str, bytes]]
        ] = {}  # name -> revision -> path -> content
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.uploaded: dict[str, bytes] = {}  # sha256 -> content
        self.asked: list[str] = []

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Make `files` the content of main; returns the commit's hash."""
        sha = hashlib.sha1(
            json.dumps(
                {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
            ).encode()
        ).hexdigest()
        self.repos.setdefault(name, {}).update({sha: files, "main": files})
        return sha

    def sha_of(self, name: str, revision: str) -> str:
        return next(
            sha
            for sha in self.repos[name]
            if len(sha) == 40 and self.repos[name][sha] is self.repos[name][revision]
        )


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        path, repos = self.path.split("?")[0], self.server.repos
        if path == "/":
            return self.reply()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (found[1], found[3] or "main") if found else (file[1], file[2])
        if name not in repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if revision not in repos[name]:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files, sha = repos[name][revision], self.server.sha_of(name, revision)
        if file and name in self.server.gated:
            return self.reply(403, X_Error_Code="GatedRepo")
        if file:
            return self.reply(
                body=files[file[3]],
                ETag=hashlib.sha1(files[file[3]]).hexdigest(),
                X_Repo_Commit=sha,
            )
        if found[2] == "tree":
            return self.reply(
                body=[
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )
        return self.reply(
            body={"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]}
        )

    do_HEAD = do_GET

    def do_POST(self):
        self.server.asked.append(self.path)
        body, repos = self.rfile.read(int(self.headers["Content-Length"])), self.server.repos
        if self.path == "/api/validate-yaml":  # the model card's front matter
            return self.reply(body={"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_writes":
            return self.reply(401, body={"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in repos:
                return self.reply(
                    409,
                    body={
                        "error": "You already created this model repo",
                        "url": f"{self.server.address}/{name}",
                    },
                )
            self.server.private[name] = (
                asked.get("visibility") == "private" or asked.get("private") is True
            )
            self.server.commit(name, {})
            return self.reply(body={"url": f"{self.server.address}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**o, "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}}
                for o in objects
            ]
            return self.reply(
                body={"transfer": "basic", "objects": actions},
                Content_Type="application/vnd.git-lfs+json",
            )
        name, what = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.split("?")[0]
        ).groups()
        if what == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.reply(body={"files": modes})
        files = dict(repos[name]["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(name, files)
        return self.reply(
            body={"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha}
        )

    def do_PUT(self):
        self.server.uploaded[self.path.split("/")[-1]] = self.rfile.read(
            int(self.headers["Content-Length"])
        )
        self.reply()


@pytest.fixture
def server():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()


def environment(home: pathlib.Path, **changes) -> dict[str, str]:
    """Of a machine whose hub cache and login are `home`; large files go by LFS, since the xet
    protocol needs a store of its own.
    """
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    return {
        **ours,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **changes,
    }


def ask(sources: list[str], **settings) -> list[str]:
    """What hub.local answers to each: "IS DIRECTORY" or "NO SENTENCE"."""
    printed = subprocess.run(
        [sys.executable, "-c", ASK, *sources],
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=True,
    )
    return printed.stdout.splitlines()


def a_model(directory, spec, one, seed=0) -> pathlib.Path:
    huggingface.write_hf_model(
        spec, transformer.init_params(spec, seed, one, jnp.bfloat16), directory
    )
    return directory


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def test_a_cached_model_is_a_source_offline_at_each_of_its_revisions(tmp_path, spec, one):
    cache = tmp_path / "hub" / "models--org--tiny"
    shas = ["1" * 40, "2" * 40]
    for seed, sha in enumerate(shas):
        a_model(cache / "snapshots" / sha, spec, one, seed)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(shas[0])
    (cache / "refs" / "better").write_text(shas[1])
    pickled = tmp_path / "hub" / "models--org--pickled"
    (pickled / "snapshots" / shas[0]).mkdir(parents=True)
    (pickled / "snapshots" / shas[0] / "pytorch_model.bin").touch()
    (pickled / "refs").mkdir()
    (pickled / "refs" / "main").write_text(shas[0])
    names = ["tiny", "tiny@better", f"tiny@{shas[1]}", "tiny@worse", "other", "pickled"]
    printed = ask(
        [*(f"hf:org/{name}" for name in names), "hf:a/b/c", "./org/tiny", "org/tiny"],
        home=tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert printed[:3] == [f"IS {cache / 'snapshots' / sha}" for sha in (shas[0], shas[1], shas[1])]
    assert all("not complete in this machine's cache" in answer for answer in printed[3:5])
    assert "has no safetensors" in printed[5] and "not a valid name" in printed[6]
    assert printed[7] == "IS org/tiny", "a path is its own"
    assert "is named hf:org/tiny" in printed[8]
    assert (
        hub.recorded_hub_name(cache / "snapshots" / shas[0]) == f"org/tiny@{shas[0]}"
        and hub.recorded_hub_name(tmp_path) is None
    )
    first, second = (
        huggingface.load_hf_model(pathlib.Path(answer[3:]), one)[1]["embed"]
        for answer in printed[:2]
    )
    assert not np.array_equal(first, second)


def test_a_model_is_fetched_without_what_could_run_code_or_lies_there_twice(
    server, tmp_path, spec, one
):
    files = contents(a_model(tmp_path / "made", spec, one)) | {
        "tokenizer.json": b"{}",
        "jaxpt.json": b"{}",
    }
    rest = [
        "pytorch_model.bin",
        "model.pt",
        "consolidated.safetensors",
        "original/tokenizer.model",
        "onnx/model.onnx",
        "modeling.py",
        "tokenizer_theirs.py",
        "vocab.pkl",
        "README.md",
    ]
    server.commit("org/tiny", files | dict.fromkeys(rest, b"x"))
    server.commit("org/closed", files)
    server.gated.add("org/closed")
    settings = {"home": tmp_path / "home", "HF_ENDPOINT": server.address}
    printed = ask(
        ["hf:org/tiny", "hf:org/tiny@main", "hf:org/tiny@nowhere", "hf:org/none", "hf:org/closed"],
        **settings,
    )
    assert (
        contents(pathlib.Path(printed[0].removeprefix("IS "))) == files and printed[1] == printed[0]
    )
    assert "has no such revision" in printed[2] and "the hub has no such model" in printed[3]
    assert "Accept it on the model's page, then log in" in printed[4]
    server.asked.clear()
    assert ask(["hf:org/tiny"], HF_HUB_OFFLINE="1", **settings) == printed[:1] and not server.asked


def download(*arguments, **settings):
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts/export_hf.py", *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
    )
    return printed.returncode, printed.stdout + printed.stderr


def test_a_pushed_export_comes_back_byte_for_byte(server, tmp_path, spec, one):
    source, out = a_model(tmp_path / "source", spec, one), tmp_path / "out"
    push = ["--from", source, "--to", out, "--push", "org/child"]
    settings = {"HF_ENDPOINT": server.address, "home": tmp_path / "home"}

    status, printed = download(*push, **settings)
    assert (
        status == 1
        and "no token" in printed
        and len(printed.splitlines()) == 1
        and not out.exists()
    ), "said before any work"
    status, printed = download(*push, **settings, HF_TOKEN="hf_reads")
    assert status == 1 and "the hub failed" in printed and "Traceback" not in printed

    status, printed = download(*push, "--private", **settings, HF_TOKEN="hf_writes")
    assert status == 0 and f"{server.address}/org/child" in printed, printed
    pushed = contents(out)
    assert server.repos["org/child"]["main"] == pushed and server.private["org/child"]
    assert pushed["model.safetensors"] == (source / "model.safetensors").read_bytes(), (
        "bfloat16 stays bfloat16"
    )
    assert {
        "manifest.json",
        "jaxpt.json",
        "README.md",
        "config.json",
        "model.safetensors",
    } <= pushed.keys()
    (fetched,) = ask(["hf:org/child"], **settings)
    fetched = contents(pathlib.Path(fetched.removeprefix("IS ")))
    assert fetched == {name: content for name, content in pushed.items() if name != "README.md"}

    # again, over an older export that was cut into more files; what is not ours stays
    server.commit(
        "org/child",
        {
            **pushed,
            "model-00001-of-00002.safetensors": b"x",
            "model.safetensors.index.json": b"{}",
            "notes.txt": b"x",
        },
    )
    status, printed = download(*push, **settings, HF_TOKEN="hf_writes")
    assert status == 0 and "finished already" in printed, printed
    assert server.repos["org/child"]["main"] == pushed | {"notes.txt": b"x"}
