"""A play without a page: commands in, moments out, over every kind of world model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes_to_play import AGENTS, CLIPS, FILMED, FRAMES, SIDE, agent, filmed, simulated

from mapo_lightning.config.compose import compose
from mapo_lightning.envs.factory import make_env
from mapo_lightning.playing.commands import MAX_MESSAGE, MAX_PHRASE, parse
from mapo_lightning.playing.scene import Drive
from mapo_lightning.playing.session import Session
from mapo_lightning.playing.settings import PlayConfig
from mapo_lightning.playing.simulated import stepwise
from mapo_lightning.run import play
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import agent_settings
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import ConfigError, EnvironmentSetupError
from tests.contract.throwaways import CopyLastFrame


def do(session: Session, name: str, **fields: Any) -> list[dict[str, Any]]:
    return session.obey(json.dumps({"do": name, **fields}))


def opened(scene: Any, folder: Path = Path("unused")) -> Session:
    session = Session(scene, PlayConfig(), folder)
    json.dumps(session.open())
    return session


def error(events: list[dict[str, Any]]) -> str:
    assert [event["is"] for event in events] == ["error"]
    return str(events[0]["text"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(AGENTS))
def test_keys_drive_simulator_and_dream_and_time_goes_back(kind: str) -> None:
    session = opened(simulated(agent(kind)))
    state = session.state()
    assert (state["number"], state["dreamt"], state["running"]) == (2, 0, False)
    assert len(session.pictures()) == 2 * SIDE * SIDE * 3
    assert do(session, "act", action=[1.0, -0.5], serial=1) == []
    seen = []
    for number in (3, 4, 5):
        assert do(session, "step") == []
        state = session.state()
        assert (state["number"], state["dreamt"]) == (number, number - 2)
        assert (state["action"], state["serial"]) == ([1.0, -0.5], 1)
        assert isinstance(state["reward"], float)
        assert isinstance(state["expected"][0], float)
        assert (state["uncertainty"][0] is None) == (kind != "ensemble")
        seen.append(session.pictures())
    # Back, and on with the same keys: the simulator plays the episode again, the dream goes alike.
    do(session, "rewind", steps=3)
    assert (session.state()["number"], session.state()["last"]) == (2, 5)
    for pictures in seen:
        assert do(session, "step") == []
        assert session.pictures() == pictures
    # Other keys lead elsewhere, and what came after is gone.
    do(session, "rewind", steps=2)
    do(session, "act", action=[-1.0, 1.0], serial=2)
    do(session, "step")
    assert (session.state()["number"], session.state()["last"]) == (4, 4)
    assert session.pictures() != seen[1]
    json.dumps(session.state(), allow_nan=False)
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("saves", [True, False])
def test_to_go_back_takes_few_steps_where_the_simulator_saves(
    saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = simulated(agent("gru"), limit=25)
    if not saves:  # as a simulator that is not `Restorable`
        monkeypatch.delattr(type(scene.env.simulator), "save")
    session, taken, step = opened(scene), [], scene.env.step
    monkeypatch.setattr(scene.env, "step", lambda action: (taken.append(1), step(action))[1])
    seen = []
    for _ in range(20):
        do(session, "act", action=[0.5, -0.5], serial=1)
        do(session, "step")
        seen.append(session.pictures())
    do(session, "rewind", steps=3)
    taken.clear()
    for pictures in seen[-3:]:
        do(session, "step")
        assert session.pictures() == pictures
    assert len(taken) == (3 + 9 if saves else 3 + 19)
    session.close()


@pytest.mark.slow
def test_the_agent_that_drives_does_what_agent_act_does() -> None:
    player = agent("gru")
    scene = simulated(player, watch=1)
    past = scene.begin(7)
    while not past[-1].ended:
        past.append(scene.advance(past, Drive((0.0, 0.0), auto=True)))
    env = make_env(player.cfg.env, 0)
    obs, _ = env.reset(seed=7)
    player.reset(7)
    for moment in past[1:]:
        action = player.act(obs["image"])
        assert moment.action == tuple(action.tolist())
        obs, reward, *_ = env.step(action)
        assert moment.reward == pytest.approx(reward)
        assert np.array_equal(moment.real, obs["image"])
    assert len(past) == 13


@pytest.mark.slow
def test_the_agent_goes_on_after_going_back_as_if_nothing_had_been() -> None:
    scene = simulated(agent("gru"), watch=1)
    past = scene.begin(3)
    drive = Drive((0.0, 0.0), auto=True)
    while len(past) < 9:
        past.append(scene.advance(past, drive))
    again = past[:4]
    while len(again) < 9:
        again.append(scene.advance(again, drive))
    for before, after in zip(past, again, strict=True):
        assert before.action == after.action
        assert np.array_equal(before.real, after.real)
        assert all(map(np.array_equal, before.frames, after.frames))


@pytest.mark.slow
def test_where_the_episode_ends_the_play_stops_and_the_dream_goes_on_alone() -> None:
    session = opened(simulated(agent("gru"), limit=5))
    do(session, "auto", on=True)
    do(session, "run", on=True)
    while session.running:
        assert session.tick() == []
    state = session.state()
    assert (state["number"], state["ended"], state["auto"]) == (5, "its time is up", False)
    assert session.tick() == []  # nothing happens while it stands
    assert session.state()["number"] == 5
    real = session.now.real
    assert do(session, "step") == []
    state = session.state()
    assert (state["number"], state["reward"], state["dreamt"]) == (6, None, 4)
    assert np.array_equal(session.now.real, real)
    assert "cannot lead on" in error(do(session, "auto", on=True))
    assert do(session, "dream") == []
    assert session.state()["dreamt"] == 0
    assert do(session, "begin", start=2**32 - 1) == []
    assert (session.state()["number"], session.state()["ended"]) == (2, "")


@pytest.mark.slow
def test_two_models_are_led_by_the_same() -> None:
    session = opened(simulated(agent("gru"), agent("gru", seed=1)))
    do(session, "auto", on=True)
    do(session, "step")
    assert len(session.state()["expected"]) == 2
    assert not np.array_equal(*session.now.frames)
    same = opened(simulated(agent("gru"), agent("gru")))
    do(same, "step")
    assert np.array_equal(*same.now.frames)  # the same random numbers too


@pytest.mark.slow
def test_a_simulator_that_fails_stops_the_play_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = simulated(agent("one dynamics"))
    session = opened(scene)
    do(session, "run", on=True)

    def fail(action: object) -> None:
        raise EnvironmentSetupError("the toy fell off the table")

    with monkeypatch.context() as broken:
        broken.setattr(scene.env, "step", fail)
        assert error(session.tick()) == "the toy fell off the table"
    assert not session.running
    assert session.state()["number"] == 2
    assert do(session, "step") == []  # it works again, from its seed
    assert session.state()["number"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILMED)
def test_clips_are_dreamt_on_led_by_what_leads_the_model(kind: str) -> None:
    session = opened(filmed(kind))
    leads = {"prelar": "latent", "apv": "nothing", "tokens": "nothing"}.get(kind, "phrase")
    assert session.scene.driver == leads
    if leads == "phrase":
        assert do(session, "phrase", text="the disc moves to the left") == [
            {"is": "told", "slots": ["the disc", "moves", "", "left", ""]}
        ]
    else:
        assert "no phrase leads this dream" in error(do(session, "phrase", text="x moves left"))
    if leads == "latent":
        width = session.scene.drive_dim
        assert do(session, "act", action=[9.0] * width, serial=1) == []
    else:
        assert "no action leads" in error(do(session, "act", action=[1.0], serial=1))
    ends = []
    for _ in range(FRAMES):
        assert do(session, "step") == []
        ends.append(session.state()["ended"])
    assert ends == [""] * 4 + ["the clip is over"] * 4
    state = session.state()
    assert (state["number"], state["reward"], state["expected"]) == (10, None, [None])
    said = "[the disc][moves][][left][]" if leads == "phrase" else ""
    assert (state["phrase"], state["action"][:1]) == (said, [3.0] if leads == "latent" else [])
    last = session.pictures()
    do(session, "rewind", steps=8)
    for _ in range(FRAMES):
        do(session, "step")
    assert session.pictures() == last
    assert do(session, "begin", start=CLIPS - 1) == []
    assert f"[0, {CLIPS - 1}]" in error(do(session, "begin", start=CLIPS))


@pytest.mark.slow
def test_phrases_lead_elsewhere_and_those_of_the_clip_can_lead() -> None:
    session = opened(filmed("mapo"))
    found = {}
    for way in ("left", "right", ""):
        do(session, "slots", slots=["disc", "moves", "pad", way, "10 percent"] if way else [""] * 5)
        do(session, "step")
        found[way] = session.now.dreams[0].belief.feat
        do(session, "rewind", steps=1)
    assert not any(np.array_equal(found[a], found[b]) for a, b in [("left", "right"), ("left", "")])
    assert do(session, "auto", on=True) == []
    do(session, "step")
    assert session.state()["phrase"] == "as in the clip"
    assert "nothing but you" in error(do(opened(filmed("apv")), "auto", on=True))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "no such command"),
        ("null", "no such command"),
        ('{"do": "<script>alert(1)</script>"}', "no such command"),
        ('{"do": ["step"]}', "no such command"),
        ('{"do": "_begin"}', "no such command"),
        ('{"do": "step", "x": 1}', "unknown fields"),
        ('{"do": "run"}', "'run' needs 'on', of type bool"),
        ('{"do": "run", "on": 1}', "of type bool"),
        ('{"do": "rewind", "steps": true}', "of type int"),
        ('{"do": "rewind", "steps": 1.5}', "of type int"),
        ('{"do": "act", "action": [NaN, 0], "serial": 1}', "no JSON"),
        ('{"do": "act", "action": [1e999, 0], "serial": 1}', "finite numbers"),
        ('{"do": "act", "action": ["1", 0], "serial": 1}', "finite numbers"),
        ('{"do": "act", "action": [true, 0], "serial": 1}', "finite numbers"),
        ('{"do": "act", "action": [0], "serial": 1}', "2 numbers here, got 1"),
        ('{"do": "act", "action": [1' + "0" * 400 + ', 0], "serial": 1}', "finite numbers"),
        ('{"do": "phrase", "text": "the disc moves left"}', "no phrase leads"),
        ('{"do": "begin", "start": -1}', "the start must lie in"),
        ('{"do": "begin", "start": 1' + "0" * 400 + "}", "the start must lie in"),
        ("[" * 60_000, "no JSON"),
        ("x" * (MAX_MESSAGE + 1), "at most 65,536 are read"),
        (b"\x00\x01", "commands are JSON text"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_makes_no_sense_gets_a_sentence_and_the_play_goes_on(
    text: str | bytes, sentence: str
) -> None:
    session = opened(simulated(agent("one dynamics"), watch=1))
    do(session, "run", on=True)
    assert sentence in error(session.obey(text))
    assert session.running
    assert session.tick() == []
    assert session.state()["number"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x" * 10_000, f"at most {MAX_PHRASE:,} characters, got 10,000"),
        ("<script>alert(1)</script>", "no action is found"),
        ("asdf qwer", "no action is found"),
    ],
    ids=lambda x: x[:20],
)
def test_a_wrong_phrase_is_not_told(text: str, sentence: str) -> None:
    session = opened(filmed("mapo"))
    do(session, "phrase", text="the disc moves up")
    assert sentence in error(do(session, "phrase", text=text))
    do(session, "step")
    assert session.state()["phrase"] == "[the disc][moves][][up][]"
    assert do(session, "phrase", text=" \u200b\n") == [{"is": "told", "slots": None}]
    do(session, "step")
    assert session.state()["phrase"] == ""
    assert "5 slots" in error(do(session, "slots", slots=["a"]))
    assert "5 slots" in error(do(session, "slots", slots=[1, 2, 3, 4, 5]))
    assert "shorten 'action'" in error(do(session, "slots", slots=["a", "b" * 65, "", "", ""]))


@pytest.mark.slow
def test_what_was_shown_is_recorded(tmp_path: Path) -> None:
    session = opened(filmed("apv"), tmp_path / "films")
    do(session, "record", on=True)
    assert session.state()["recording"]
    for _ in range(3):
        do(session, "step")
    names = ["play-001.mp4", "play-001.png"]
    folder = str(tmp_path / "films")
    assert do(session, "record", on=False) == [{"is": "saved", "files": names, "folder": folder}]
    assert sorted(path.name for path in (tmp_path / "films").iterdir()) == names
    assert sorted(session.saved) == names
    assert "nothing was recorded" in error(do(session, "record", on=False))
    do(session, "record", on=True)
    assert do(session, "record", on=False)[0]["files"] == ["play-002.mp4", "play-002.png"]
    (tmp_path / "file").touch()
    session.folder = tmp_path / "file"
    do(session, "record", on=True)
    assert "cannot be written" in error(do(session, "record", on=False))


def test_models_that_cannot_be_played_or_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="CopyLastFrame cannot be played"):
        stepwise(CopyLastFrame())
    with pytest.raises(ConfigError, match="led by latent, phrase"):
        filmed("mapo", "prelar")


@pytest.mark.parametrize(
    "words", [{"port": -1}, {"fps": 0}, {"fps": 61}, {"watch": 0}, {"start": -1}]
)
def test_settings_of_the_page_have_bounds(words: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        PlayConfig(**words)


def test_a_command_is_read_with_its_fields() -> None:
    assert parse('{"do": "go", "number": 3}') == {"do": "go", "number": 3}


@pytest.mark.slow
def test_the_agent_that_comes_with_the_package_dreams() -> None:
    folder = play.SHIPPED
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    card = json.loads((folder / "card.json").read_text())
    tensors = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(tensors).hexdigest() == card["sha256"]
    base = agent_settings(folder, [])
    cfg = compose([], RunConfig, conf_folder(), base, RENAMED).config
    session = opened(play.simulated([cfg], [folder], [])())
    do(session, "auto", on=True)
    errors, rewards = [], []
    for _ in range(20):
        assert do(session, "step") == []
        errors.append(
            float(np.abs(session.now.real / 255.0 - session.now.frames[0] / 255.0).mean())
        )
        rewards.append(session.state()["reward"])
        assert session.state()["uncertainty"][0] >= 0.0
    assert max(errors) < 0.15  # a dream of this floor, disc and pad, not of anything
    assert rewards[-1] > 2 * rewards[0]  # the agent pushes the disc onto its pad
