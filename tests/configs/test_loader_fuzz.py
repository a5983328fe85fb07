"""Damaged and hostile configs: each loads or ends in one short sentence (`UserError`), quickly and in little memory.

The seed is fixed, so the same configs are read in every run.
"""

import random
import re
from pathlib import Path

import pytest

from deeplab2_like.configs import Config, list_configs, load_config
from deeplab2_like.configs.loader import builtin_config_file
from deeplab2_like.errors import UserError

NUM_CASES = 2000
MAX_MESSAGE = 2000

TINY = "panoptic_deeplab/scenes_tiny"

# Values that YAML, Python or pydantic treat in a special way.
ODD_VALUES = (
    *("2024", "2024-02-03", "2024-02-30", "2024-13-45", "2001-01-01T25:00:00", "1:30", "007", "0x10", "0x_", "0b_"),
    *("!!int abc", "!!int ''", "!!float x", "!!timestamp abc", "!!bool maybe", "!!binary a", "!!set {a}", "!x y"),
    *("1e400", ".inf", ".nan", "-1", "-0.0", "1_0", "9" * 20, "1" * 5000, "0." + "1" * 5000, "1e-400"),
    *("true", "null", "~", "on", "no", "''", '"\\x1b[31m"', "\x1b[31m", "\ud800", "\u202eabc", "'", '"', "|", ">", "%"),
    *("[]", "{}", "[[1]]", "{a: 1}", "{a: 1, a: 2}", "{1: 2}", "{[1]: 2}", "? [a]", "<<: 3", "{<<: [1]}", "- - - 1"),
    *("[" * 60, "[" * 3000, "{a: " * 60 + "1" + "}" * 60, "? " * 3000, "&a [*a]", "*a", "&a 1", "x" * 5000, "a: b: c"),
    "[" + "1, " * 30_000 + "1]",
)


def random_override(rng: random.Random, texts: list[str]) -> str:
    """`KEY.PATH=VALUE` with a key of a built-in config, or one that is made up."""
    keys = re.findall(r"^ *(\w+):", rng.choice(texts), re.MULTILINE)
    path = ".".join(rng.choice(["model", "trainer", "data", *keys]) for _ in range(rng.randint(1, 3)))
    return f"{path}{rng.choice(['=', '=', '=', '==', ''])}{rng.choice(ODD_VALUES)}"


def mutated(rng: random.Random, text: str) -> str:
    """A config with a few changes of its values, lines or letters."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines[number] = re.sub(r": .*", lambda _: f": {rng.choice(ODD_VALUES)}", lines[number])
            case 1:
                del lines[number]
            case 2:
                lines.insert(rng.randrange(len(lines)), lines[number])
            case 3:
                lines[number] = rng.choice(("", " ", "  ", "\t")) + lines[number].strip()
            case 4:
                start = rng.randrange(len(lines[number]) + 1)
                letter = rng.choice(":[]{},&*!|>'\"%@`#-?~ 09aé\x00\x1b\ufeff\u2028")
                lines[number] = lines[number][:start] + letter + lines[number][start + 1 :]
        text = "\n".join(lines) + "\n"
    return text


def test_random_configs(tmp_path: Path) -> None:
    rng = random.Random(22)
    texts = [builtin_config_file(name).read_text(encoding="utf-8") for name in list_configs()]
    path = tmp_path / "mine.yaml"
    loaded, messages = 0, []
    for case in range(NUM_CASES):
        overrides = [random_override(rng, texts) for _ in range(rng.choice((1, 1, 2)))] if rng.random() < 0.5 else []
        source: str | Path = TINY
        if not overrides or rng.random() < 0.2:
            path.write_text(mutated(rng, rng.choice(texts)), encoding="utf-8", errors="surrogatepass")
            source = path
        try:
            assert isinstance(load_config(source, overrides), Config)
            loaded += 1
        except UserError as error:
            messages.append(str(error))
        except BaseException as error:
            error.add_note(f"case {case}: {overrides}")
            raise
    assert loaded > NUM_CASES // 10
    assert len(messages) > NUM_CASES // 2
    assert all(10 < len(message) <= MAX_MESSAGE for message in messages)


def bomb(levels: int) -> str:
    """A list of 10 values, a list of 10 times that list, and so on."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join([f"base: {TINY}", *lines, f"trainer: {{steps: *a{levels - 1}}}\n"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(7), r"is not valid YAML: it has more than 20000 values, those of aliases included\.$"),
        # 10 + 100 + 1,000 values are no danger, but too many for a message.
        (bomb(3), r"Config key 'trainer\.steps' in .* is \[\[\['x', .* \.\.\. .*'x'\]\]\], but must be a whole number"),
        ("a: &a [1, *a]", r"is not valid YAML: '\*a' stands for a value that it is a part of\.$"),
        ("a: " + "[" * 51 + "]" * 51, r"is not valid YAML: it is nested in more than 50 levels\.$"),
        ("a: " + "[" * 100_000, r"is not valid YAML: "),
        ("".join(f"{' ' * level}a:\n" for level in range(1000)), r"is not valid YAML: it is nested in more than 50"),
        ("#" * 1_000_001, r"is not valid YAML: it has more than 1000000 characters\.$"),
        ("".join(f"key{number}: 1\n" for number in range(20_000)), r"is not valid YAML: it has more than 20000 values"),
        (
            f"base: {TINY}\n" + "".join(f"key{number}: 1\n" for number in range(1000)),
            r"^Unknown config key 'key0'\. .*'key4'\. Known: data, model, system, trainer\. There are 995 more fau",
        ),
        (
            f"base: {TINY}\n? {'k' * 100_000}\n: 1",
            r"^Unknown config key 'kkk.* \.\.\. k*kkk'\. Known: data, model, sys",
        ),
        (
            f"base: {TINY}\ntrainer: {{steps: 1}}\ntrainer: {{}}",
            r"is not valid YAML: it has the key 'trainer' twice in ",
        ),
    ],
)
def test_hostile_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert len(str(error.value)) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "name", ["2024", "2024-02-03", "2024-02-30", "007", "1_000", "0x10", "1:30", "1e3", "no", "1.50"]
)
def test_names_that_look_like_other_values_are_text(tmp_path: Path, name: str) -> None:
    config = load_config(TINY, [f"data.path={name}", f"data.val_split={name}"])
    assert (config.data.path, config.data.val_split) == (name, name)
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {TINY}\ndata: {{path: {name}}}\n")
    assert load_config(path).data.path == name


def test_booleans_of_older_yaml() -> None:
    config = load_config(TINY, ["data.flip=no", "data.dihedral=on"])
    assert (config.data.flip, config.data.dihedral) == (False, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps=99999999999999999999", "is a number of 67 bits, but must be between -9223372036854775807 and"),
        ("trainer.steps=" + "1" * 5000, "1', but must be at most 9223372036854775807"),
        ("trainer.learning_rate=.inf", "'trainer.learning_rate' .* is inf, but must be a finite number"),
        ("trainer.learning_rate=1.0e+400", "'trainer.learning_rate' .* is inf, but must be a finite number"),
        ("data.path=!!int abc", r"not valid YAML \(a value of the type !!int cannot be read in line 1\); quote it"),
        ("data.path=!!python/object:os.system x", r"not valid YAML \(could not determine a constructor for the tag"),
    ],
)
def test_hostile_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(TINY, [override])


def test_the_order_of_keys_does_not_matter() -> None:
    """Features are always joined from coarse to fine."""
    orders = ("{stem: 8, res2: 16, res3: 32}", "{res3: 32, stem: 8, res2: 16}")
    for order in orders:
        config = load_config(
            TINY,
            [f"model.decoder.low_level_channels={order}", f"model.decoder.instance_low_level_channels={orders[0]}"],
        )
        assert list(config.model.decoder.low_level_channels.items()) == [("res3", 32), ("res2", 16), ("stem", 8)]
