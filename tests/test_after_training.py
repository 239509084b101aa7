"""docs/after-training.md, line by line, on a small model."""

import json
import re
import shlex
from http.server import HTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from trl_diffusion.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "after-training.md"


def trained(folder):
    """An adapter as a trainer would have left it, and its base."""
    make_model(max_sequence_length=256).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = make_model(max_sequence_length=256)
    base.config._name_or_path = str(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "LLaDA-8B-VRPO")
    make_tokenizer().save_pretrained(folder / "LLaDA-8B-VRPO")


def asked_once(server):
    """Instead of for ever: what the server answers to one request."""
    thread = Thread(target=server.handle_request)
    thread.start()
    body = {"messages": [{"role": "user", "content": "what is one"}], "max_tokens": 8}
    with urlopen(Request(f"http://127.0.0.1:{server.server_port}", json.dumps(body).encode())) as response:
        found = json.load(response)
    thread.join()
    server.server_close()
    return found


def test_every_line_of_the_page(tmp_path, monkeypatch, capsys):
    trained(tmp_path)
    (tmp_path / "held-out.txt").write_text("what is one plus two")
    monkeypatch.chdir(tmp_path)
    names, served = {}, []
    monkeypatch.setattr(HTTPServer, "serve_forever", lambda server: served.append(asked_once(server)))
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for language, code in blocks:
        if language == "python":
            exec(code.replace("8000", "0"), names)  # any port that is free
            continue
        for line in code.strip().splitlines():
            program, *arguments = shlex.split(line)
            on_the_cpu = [] if arguments[0] == "merge" else ["--use_cpu"]
            assert program == "trl-diffusion" and main([*arguments, *on_the_cpu]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("> Why is the sky blue?") == 2 and "perplexity per byte" in said and "Merged model in" in said
    (answer,) = served
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert type(names["model"]).__name__ == "LLaDAModelLM" and names["answer"].shape[1] > 128
