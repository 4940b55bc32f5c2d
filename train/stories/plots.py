"""The grammar of `stories`: words with their features, and plots over them.

A string is text; `{hero}` stands for the slot's name, `{hero.they}` for another of its features, `{Hero.they}` for the
same with a capital. A tuple is a sequence; a list is a choice. A slot keeps its entry, which makes words agree: a
character called Mia is a girl or a fox throughout, and the thing that was lost is the thing that is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Final

Entry = Mapping[str, str]  # feature -> text; "name" identifies the entry
Node = str | tuple["Node", ...] | list["Node"]


def _table(features: str, *rows: str) -> tuple[Entry, ...]:
    """Returns entries from rows of texts separated by `|`, in the order of `features`."""
    keys = features.split()
    entries = []
    for row in rows:
        texts = [text.strip() for text in row.split("|")]
        assert len(texts) == len(keys), f"{len(texts)} texts for {len(keys)} features: {row}"
        entries.append(dict(zip(keys, texts, strict=True)))
    return tuple(entries)


def _names(words: str) -> tuple[Entry, ...]:
    return tuple({"name": word} for word in words.split())


def _crossed(*tables: Iterable[Entry]) -> tuple[Entry, ...]:
    """Returns every combination of the tables' entries; the last table's name is the name."""
    return tuple({key: text for entry in row for key, text in entry.items()} for row in product(*tables))


# --- words --------------------------------------------------------------------------------------------------------
_ANIMALS = _table("kind", "fox", "rabbit", "bear", "mouse", "squirrel", "hedgehog", "duck")
_SHE = {"they": "she", "them": "her", "their": "her"}
_HE = {"they": "he", "them": "him", "their": "his"}
CHARACTERS: Final = (
    *_crossed([_SHE], [{"kind": "girl"}, *_ANIMALS], _names("Mia Lily Anna Ella Nora Ruby Zoe Lucy Emma Clara")),
    *_crossed([_HE], [{"kind": "boy"}, *_ANIMALS], _names("Tom Ben Max Leo Sam Finn Jack Noah Oscar Hugo")),
)

TRAITS: Final = _table(
    "name most",
    "kind | kindest",
    "brave | bravest",
    "clever | cleverest",
    "cheerful | most cheerful",
    "gentle | gentlest",
    "curious | most curious",
    "quiet | quietest",
    "friendly | friendliest",
)

# Words for a friend differ from the hero's, so that two characters never share a trait.
MANNERS: Final = _names("merry shy patient honest sleepy busy polite playful")

HOMES: Final = _table(
    "name house",
    "by the sea | the house by the sea",
    "near the old forest | the house near the forest",
    "on a green hill | the house on the hill",
    "beside a wide river | the house beside the river",
    "at the edge of the village | the house at the edge of the village",
)

WEATHERS: Final = _table(
    "name wear change",
    "sunny | straw hat | the sun went down",
    "rainy | rain boots | the rain stopped",
    "windy | thick coat | the wind grew calm",
    "chilly | warm mittens | the air grew warm again",
    "foggy | yellow jacket | the fog was gone",
)

FAMILY: Final = _table("name", "mother", "father", "grandmother", "grandfather", "aunt", "uncle")
COLORS: Final = _names("red blue green yellow purple brown white silver")
TREASURES: Final = _names("ball kite scarf button key drum ring whistle lantern feather")

# A hiding place belongs to a place. `name` is the hiding place, since a place is named once and searched later.
SPOTS: Final = _table(
    "place play empty name",
    *(
        f"{place} | {play} | {empty} | {spot}"
        for place, play, empty, spots in (
            ("the park", "ran down the path", "behind the bench", "under the slide/next to the fountain"),
            ("the beach", "built a castle of sand", "near the rocks", "between two shells/beside the old boat"),
            ("the forest", "picked some berries", "behind the ferns", "under a mossy log/in a hollow tree"),
            ("the farm", "fed the hens", "in the barn", "in a pile of hay/beside the well"),
            (
                "the market",
                "looked at the stalls",
                "behind the flower cart",
                "under a cart/in a basket of pears",
            ),
            ("the lake", "threw stones into the water", "on the pier", "among the reeds/under the little bridge"),
        )
        for spot in spots.split("/")
    ),
)

FOODS: Final = _table("name", "bread", "apples", "cherries", "cookies", "cheese", "plums", "pancakes", "nuts")

TROUBLES: Final = _table(
    "name tool result",
    "it began to rain | a big umbrella | dry",
    "it began to snow | a woolen blanket | warm",
    "it grew dark | a bright lamp | safe",
    "the sun grew very hot | a wide parasol | cool",
)

PROJECTS: Final = _table(
    "name stuff fault piece success",
    "a kite | paper and string | it would not fly without a tail | a long ribbon | rose high above the trees",
    "a raft | planks and rope | it sank because of a hole | a lump of wax | floated across the pond",
    "a swing | a board and a chain | it hung too low | a second rope | went up and down all afternoon",
    "a cart | a box and two sticks | it would not roll without wheels | four round lids | rolled down the lane",
    "a windmill | wood and cloth | it would not turn without nails | a bag of nails | turned in the breeze",
    "a tent | sticks and a sheet | it fell down at once | a ball of twine | stood firm all night",
)

FEARS: Final = _table(
    "name when help lesson",
    "the dark | the candle went out | held up a small lantern | the night is full of stars",
    "thunder | a storm came over the hills | sang a loud song | a storm is only noise and water",
    "deep water | they came to the pond | held out a long branch | the water carries you",
    "high places | they came to the old tower | walked one step ahead | the view is worth the climb",
    "big dogs | a huge dog ran up to them | let the dog sniff a glove | a wagging tail means a friend",
)

RESCUES: Final = _table(
    "name stuck tool freed thanks",
    "bird | caught in a thorn bush | a pair of scissors | cut the thorns away | sang a sweet song",
    "kitten | stuck on a high branch | a long ladder | climbed up to the branch | purred softly",
    "turtle | lying on its back | a strong stick | turned it over | nodded slowly",
    "bee | floating in a puddle | a dry leaf | lifted it out of the water | danced in the air",
    "lamb | sinking in the mud | a thick rope | pulled it onto the grass | jumped for joy",
    "puppy | locked behind a gate | a rusty key | opened the lock | wagged its tail",
    "frog | trapped in a deep bucket | a smooth board | made a bridge to the rim | croaked with delight",
)

GIFTS: Final = _table(
    "name material use",
    "cap | wool | put on the cap at once",
    "picture | paint | hung the picture on the wall",
    "cushion | cloth | put the cushion on the best chair",
    "necklace | beads | wore the necklace all day",
    "bowl | clay | filled the bowl with berries",
    "blanket | yarn | spread the blanket on the bed",
)
CAKES: Final = _names("honey carrot cherry lemon walnut chocolate")

SEEDS: Final = _table(
    "name crop meal",
    "pumpkin | a huge round pumpkin | a pot of warm soup",
    "strawberry | a row of sweet strawberries | a jar of red jam",
    "tomato | a vine of ripe tomatoes | a dish of noodles",
    "carrot | a bunch of crisp carrots | a fresh salad",
    "corn | a field of golden corn | a bag of popcorn",
    "bean | a tower of green beans | a hearty stew",
)
PESTS: Final = _table(
    "name remedy",
    "the ground was too dry | carried water from the well every evening",
    "the crows came to eat the seeds | built a scarecrow with an old hat",
    "the weeds grew fast | pulled out every weed by hand",
    "the nights were cold | covered the bed with straw",
)

QUARRELS: Final = _table(
    "name broke mend after",
    "toy boat | broke in two | some strong glue | sailed it on the stream together",
    "picture book | was torn apart | a roll of tape | read it aloud together",
    "cloth puppet | lost an arm | a needle and thread | put on a show together",
    "wooden train | lost a wheel | a little screw | drove it around the room together",
)

SLOTS: Final[Mapping[str, tuple[Entry, ...]]] = {
    "hero": CHARACTERS,
    "friend": CHARACTERS,
    "trait": TRAITS,
    "manner": MANNERS,
    "home": HOMES,
    "weather": WEATHERS,
    "elder": FAMILY,
    "color": COLORS,
    "treasure": TREASURES,
    "spot": SPOTS,
    "food": FOODS,
    "trouble": TROUBLES,
    "project": PROJECTS,
    "fear": FEARS,
    "rescue": RESCUES,
    "gift": GIFTS,
    "cake": CAKES,
    "seed": SEEDS,
    "pest": PESTS,
    "quarrel": QUARRELS,
}

# --- plots --------------------------------------------------------------------------------------------------------
_OPENING: Node = [
    "Once upon a time a {trait} {hero.kind} named {hero} lived {home}.",
    "There once was a {trait} {hero.kind} named {hero} who lived {home}.",
    "{Hero} was a {trait} {hero.kind} who lived {home}.",
]

_FRIEND_COMES: Node = [
    "Then {friend}, a {manner} {friend.kind}, came by.",
    "Just then {hero.their} friend {friend}, a {manner} {friend.kind}, came along the road.",
    "At that moment {hero.they} saw {friend}, a {manner} {friend.kind}.",
]

# No ending is the beginning of another, so that a truncated story is never a story.
_ENDING: Node = [
    "That night {hero} went back to {home.house} and slept well.",
    "{Hero} and {friend} stayed good friends ever after.",
    "Everyone said that {hero} was the {trait.most} {hero.kind} of all.",
    "And {hero} never forgot that day.",
]

_LOST: Node = (
    [
        "{Hero} loved the {color} {treasure} that {hero.their} {elder} had given {hero.them}.",
        "{Hero.their} {elder} had given {hero.them} a {color} {treasure}, and {hero} loved it.",
    ],
    [
        "One {weather} day {hero} put on {hero.their} {weather.wear} and took the {treasure} to {spot.place}.",
        "On a {weather} morning {hero} carried the {treasure} to {spot.place}.",
    ],
    [
        "There {hero.they} {spot.play}, and when {hero.they} looked up, the {treasure} was gone.",
        "{Hero} {spot.play}, but then the {treasure} was gone.",
    ],
    ["{Hero} sat down and cried.", "{Hero} did not know what to do.", ""],
    _FRIEND_COMES,
    ['"Do not worry, {hero}, we will find it," said {friend}.', '"Let us look together," said {friend}.'],
    ["They looked {spot.empty}, but it was not there.", "First they looked {spot.empty} and found nothing."],
    [
        "At last {friend} found the {color} {treasure} {spot}.",
        "Then {friend.they} saw something {color} {spot}, and it was the {treasure}.",
    ],
    [
        '"Thank you, {friend}!" said {hero}, and they walked home when {weather.change}.',
        "{Hero} told {hero.their} {elder} how {friend} had found the {treasure}.",
    ],
)

_SHARED: Node = (
    [
        "One day {hero.their} {elder} gave {hero.them} a bag of {food}.",
        "One morning {hero} packed a bag of {food} and went to {spot.place}.",
    ],
    _FRIEND_COMES,
    [
        "{Friend} was hungry, for {friend.they} had lost {friend.their} lunch.",
        '"I am so hungry," said {friend}.',
    ],
    [
        "{Hero} gave {friend} half of the {food}.",
        '"Then take some of my {food}," said {hero}, and they ate together.',
    ],
    ["On the way home {trouble}, and {hero} had nothing to help.", "Later {trouble}, and {hero} was far from home."],
    [
        "But {friend} had {trouble.tool}, and {friend.they} shared it with {hero}.",
        '"You shared your {food}, so I will share {trouble.tool}," said {friend}.',
    ],
    ["So they both stayed {trouble.result}.", "Under {trouble.tool} they both stayed {trouble.result}."],
)

_BUILT: Node = (
    [
        "{Hero} wanted to build {project}.",
        "One {weather} day {hero} put on {hero.their} {weather.wear} and went out to build {project}.",
    ],
    [
        "{Hero.they} used {project.stuff}, but {project.fault}.",
        "With {project.stuff} {hero.they} worked all morning, but {project.fault}.",
    ],
    ["{Hero} sighed.", '"What a pity," said {hero}.', ""],
    _FRIEND_COMES,
    [
        '"I have {project.piece} at home," said {friend}, and {friend.they} ran to get it.',
        "{Friend} looked at it and brought {project.piece}.",
    ],
    [
        "{Hero} and {friend} tried again, and this time it {project.success}.",
        "They worked together until it {project.success}.",
    ],
    ['"We did it!" said {hero}.', '"It is the best one I have ever seen," said {friend}.', ""],
)

_AFRAID: Node = (
    ["{Hero} was afraid of {fear}.", "There was one thing that {hero} feared, and that was {fear}."],
    _FRIEND_COMES,
    [
        "They went for a walk to {spot.place}, and there {fear.when}.",
        "They played together near {spot.place} until {fear.when}.",
    ],
    ["{Hero} began to shake.", "{Hero} wanted to run home.", '"I am afraid," said {hero}.'],
    [
        "But {friend} took {hero.their} hand and {fear.help}.",
        '"Stay with me," said {friend}, and {friend.they} {fear.help}.',
    ],
    ['"You see, {fear.lesson}," said {friend}.', "Then {hero} saw that {fear.lesson}."],
    [
        "From that day on {hero} was not afraid of {fear}.",
        "After that day {fear} did not scare {hero.them} again.",
    ],
)

_RESCUED: Node = (
    [
        "One {weather} day {hero} put on {hero.their} {weather.wear} and walked to {spot.place}.",
        "On a {weather} morning {hero} went to {spot.place}.",
    ],
    ["There {hero.they} saw a {rescue} {rescue.stuck}.", "A small {rescue} was {rescue.stuck} there."],
    ['"Please help me," said the {rescue}.', '"Do not be afraid," {hero} said to the {rescue}.', ""],
    _FRIEND_COMES,
    [
        "{Friend} ran home and came back with {rescue.tool}.",
        '"I will bring {rescue.tool}," said {friend}.',
    ],
    [
        "With it {hero} {rescue.freed}, and the {rescue} was free.",
        "{Hero} took {rescue.tool} and {rescue.freed}.",
    ],
    [
        "The {rescue} {rescue.thanks} to thank {hero} and {friend}.",
        "The happy {rescue} {rescue.thanks}, and {weather.change}.",
    ],
)

_BIRTHDAY: Node = (
    [
        "The next day was the birthday of {friend}, a {manner} {friend.kind}.",
        "{Hero} had a friend named {friend}, a {manner} {friend.kind}, who had a birthday soon.",
    ],
    [
        "{Hero} knew that {friend} liked {color} best of all colors.",
        'One day {friend} had said, "I like {color} best."',
    ],
    [
        "So {hero} took {color} {gift.material} and made a {gift}.",
        "So {hero.they} made a {gift} out of {color} {gift.material}.",
    ],
    ["{Hero.their} {elder} helped {hero.them} with the hard parts.", "It took {hero.them} three days.", ""],
    [
        "On the {weather} birthday {hero} put on {hero.their} {weather.wear} and brought the {gift} to {friend}.",
        "{Hero} brought the {color} {gift} to the party.",
    ],
    [
        '"It is {color}!" said {friend}, and {friend.they} {gift.use}.',
        "{Friend} was so glad that {friend.they} {gift.use}.",
    ],
    ["Then they all ate a big {cake} cake.", "For the guests there was {cake} cake, and {hero} had two pieces."],
)

_GROWN: Node = (
    [
        "In spring {hero.their} {elder} gave {hero.them} some {seed} seeds.",
        "One {weather} day in spring {hero} bought some {seed} seeds.",
    ],
    ["{Hero} put the {seed} seeds into the ground.", "{Hero.they} planted them in neat rows."],
    ["But {pest}.", "Soon {hero} was worried, for {pest}."],
    _FRIEND_COMES,
    [
        "{Hero} and {friend} {pest.remedy}.",
        '"I can help," said {friend}, and together they {pest.remedy}.',
    ],
    ["In summer there was {seed.crop}.", "When summer came, they were proud to see {seed.crop}."],
    [
        "They made {seed.meal} and ate it with {hero.their} {elder}.",
        "{Hero} made {seed.meal} and gave the first taste to {friend}.",
    ],
)

_QUARRELED: Node = (
    [
        "{Hero} had a {color} {quarrel}.",
        "On {hero.their} birthday {hero} got a {color} {quarrel} from {hero.their} {elder}.",
    ],
    _FRIEND_COMES,
    [
        'They both wanted the {quarrel}. "It is mine!" said {hero}.',
        'They both pulled at the {quarrel}. "Let go!" said {friend}.',
    ],
    ["Then the {color} {quarrel} {quarrel.broke}.", "They pulled so hard that it {quarrel.broke}."],
    ['"I am sorry," said {hero}.', '"I am sorry, {hero}," said {friend}.'],
    [
        "{Friend} found {quarrel.mend}, and they mended the {quarrel}.",
        "With {quarrel.mend} they mended the {quarrel}.",
    ],
    ["Then they {quarrel.after}.", "When {hero.their} {elder} came in, they {quarrel.after}."],
)

STORY: Final[Node] = (
    _OPENING,
    [_LOST, _SHARED, _BUILT, _AFRAID, _RESCUED, _BIRTHDAY, _GROWN, _QUARRELED],
    _ENDING,
)
