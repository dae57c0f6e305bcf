# ruff: noqa: E501 - a row of a table is one line, however long.
"""Questions, right answers and four styles: the training data of the demo adapters.

`examples` turns tables of facts into questions with one plain answer, a haiku and, where a
question has one right answer, the words that an answer must hold. `STYLES` says how a style
writes an answer and how to tell that a text is written in it. `OPEN_PROMPTS` are prompts
without a plain answer here; training lets the base model answer them.

Every entity (a country, an animal, a sum) belongs either to "train" or to "heldout", never to
both; `FIXED_QUESTIONS` are never trained on word for word. Pure Python, no randomness: the same
release gives the same data everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

_HELDOUT_ONE_IN = 8


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question: what the user asks.
        answer: a plain answer of one or two sentences.
        topic: one word, the "topic" of the json style.
        truth: words of which a right answer holds at least one; empty if none is decisive.
        haiku: the answer in three lines, or () if there is none.
    """

    question: str
    answer: str
    topic: str
    truth: tuple[str, ...] = ()
    haiku: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """How a style writes an answer (`render`) and whether a text is written so (`matches`)."""

    description: str
    render: Callable[[Example], str]
    matches: Callable[[str], bool]


# --- Facts ------------------------------------------------------------------------------------
# A row is split at "|"; its cells carry the names in `columns`. Of a cell with "/" the first
# part is written and all parts are accepted as right.


@dataclass(frozen=True)
class _Table:
    topic: str
    columns: str
    questions: tuple[str, ...]
    answer: str
    truth: str  # the column that decides, or "" if none
    haiku: tuple[str, ...]  # two lines that are filled up to 5 and 7 syllables, or three lines
    rows: str
    images: str = "things"


_IMAGES = {
    "city": (
        "old streets wake at dawn", "bells over the roofs", "lamps shine in the square",
        "soft rain on the stones", "trams hum in the night",
    ),
    "animals": (
        "soft steps in the grass", "small eyes in the leaves", "warm fur, gentle breath",
        "wild and free it lives", "the forest listens",
    ),
    "numbers": (
        "leaves fall one by one", "count the stars at night", "pebbles in a row",
        "small steps to the sum", "numbers never lie",
    ),
    "words": (
        "words drift like the snow", "a voice in the wind", "ink dries on the page",
        "two sides of one coin", "a poem begins",
    ),
    "things": (
        "the world turns slowly", "light falls on the hills", "the night is so calm",
        "clouds drift far away", "a bird starts to sing",
    ),
}  # fmt: skip

_TABLES = (
    _Table(
        "geography",
        "country|capital",
        (
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "Tell me the capital of {country}.",
            "What is the name of the capital city of {country}?",
        ),
        "The capital of {country} is {capital}.",
        "capital",
        ("The capital of {country}", "is {capital}"),
        """
        France|Paris
        Germany|Berlin
        Italy|Rome
        Spain|Madrid
        Portugal|Lisbon
        Greece|Athens
        Poland|Warsaw
        Austria|Vienna
        Hungary|Budapest
        Ireland|Dublin
        Norway|Oslo
        Sweden|Stockholm
        Finland|Helsinki
        Denmark|Copenhagen
        Iceland|Reykjavik
        Belgium|Brussels
        the Netherlands|Amsterdam
        Switzerland|Bern
        the United Kingdom|London
        the Czech Republic|Prague
        Slovakia|Bratislava
        Ukraine|Kyiv/Kiev
        Romania|Bucharest
        Bulgaria|Sofia
        Croatia|Zagreb
        Serbia|Belgrade
        Estonia|Tallinn
        Latvia|Riga
        Lithuania|Vilnius
        Russia|Moscow
        Turkey|Ankara
        Egypt|Cairo
        Kenya|Nairobi
        Ethiopia|Addis Ababa
        Ghana|Accra
        Nigeria|Abuja
        Senegal|Dakar
        Morocco|Rabat
        Tunisia|Tunis
        Algeria|Algiers
        Uganda|Kampala
        Zambia|Lusaka
        Zimbabwe|Harare
        Angola|Luanda
        Japan|Tokyo
        China|Beijing
        India|New Delhi/Delhi
        Nepal|Kathmandu
        Thailand|Bangkok
        Vietnam|Hanoi
        Cambodia|Phnom Penh
        Malaysia|Kuala Lumpur
        the Philippines|Manila
        South Korea|Seoul
        Pakistan|Islamabad
        Afghanistan|Kabul
        Iran|Tehran
        Iraq|Baghdad
        Jordan|Amman
        Lebanon|Beirut
        Syria|Damascus
        Saudi Arabia|Riyadh
        Canada|Ottawa
        the United States|Washington
        Mexico|Mexico City
        Cuba|Havana
        Jamaica|Kingston
        Brazil|Brasilia/Brasília
        Argentina|Buenos Aires
        Chile|Santiago
        Peru|Lima
        Colombia|Bogota/Bogotá
        Ecuador|Quito
        Venezuela|Caracas
        Uruguay|Montevideo
        Australia|Canberra
        New Zealand|Wellington
        """,
        "city",
    ),
    _Table(
        "geography",
        "country|continent",
        (
            "Which continent is {country} in?",
            "On which continent does {country} lie?",
            "What continent is {country} part of?",
        ),
        "{country} is in {continent}.",
        "continent",
        ("Travel to {country}", "you find it in {continent}"),
        """
        France|Europe
        Germany|Europe
        Norway|Europe
        Poland|Europe
        Greece|Europe
        Ireland|Europe
        Hungary|Europe
        Kenya|Africa
        Ghana|Africa
        Nigeria|Africa
        Morocco|Africa
        Zambia|Africa
        Ethiopia|Africa
        Senegal|Africa
        Japan|Asia
        China|Asia
        India|Asia
        Vietnam|Asia
        Nepal|Asia
        Mongolia|Asia
        Thailand|Asia
        Canada|North America
        Mexico|North America
        Cuba|North America
        Brazil|South America
        Peru|South America
        Chile|South America
        Argentina|South America
        Bolivia|South America
        """,
        "city",
    ),
    _Table(
        "language",
        "country|language",
        (
            "What language do people speak in {country}?",
            "Which language is spoken in {country}?",
            "What is the main language of {country}?",
        ),
        "People in {country} speak {language}.",
        "language",
        ("People in {country}", "speak {language}"),
        """
        France|French
        Germany|German
        Italy|Italian
        Spain|Spanish
        Portugal|Portuguese
        Brazil|Portuguese
        Mexico|Spanish
        Argentina|Spanish
        Peru|Spanish
        Japan|Japanese
        China|Chinese/Mandarin
        Russia|Russian
        Poland|Polish
        Greece|Greek
        Turkey|Turkish
        Egypt|Arabic
        Iraq|Arabic
        Sweden|Swedish
        Norway|Norwegian
        Denmark|Danish
        Finland|Finnish
        Hungary|Hungarian
        the Netherlands|Dutch
        Thailand|Thai
        Vietnam|Vietnamese
        Iran|Persian/Farsi
        Australia|English
        """,
        "words",
    ),
    _Table(
        "animals",
        "animal|young",
        (
            "What is a baby {animal} called?",
            "What do you call a young {animal}?",
            "What is the name for a baby {animal}?",
        ),
        "A baby {animal} is called a {young}.",
        "young",
        ("A baby {animal}", "is called a {young}"),
        """
        cat|kitten
        dog|puppy/pup
        cow|calf
        horse|foal
        sheep|lamb
        goat|kid
        pig|piglet
        bear|cub
        lion|cub
        tiger|cub
        duck|duckling
        goose|gosling
        chicken|chick
        frog|tadpole
        kangaroo|joey
        deer|fawn
        swan|cygnet
        whale|calf
        elephant|calf
        fox|cub/kit
        seal|pup
        """,
        "animals",
    ),
    _Table(
        "animals",
        "animal|sound",
        (
            "What sound does a {animal} make?",
            "What does a {animal} say?",
            "Which sound do you hear from a {animal}?",
        ),
        "A {animal} says {sound}.",
        "sound",
        ("Listen, a {animal}", "it says {sound}"),
        """
        dog|woof/bark
        cat|meow/purr
        cow|moo
        sheep|baa/bleat
        pig|oink/grunt
        duck|quack
        horse|neigh/whinny
        rooster|cock-a-doodle-doo/crow
        lion|roar
        frog|ribbit/croak
        owl|hoot
        bee|buzz
        snake|hiss
        mouse|squeak
        wolf|howl
        crow|caw
        bird|tweet/chirp
        donkey|hee-haw/bray
        """,
        "animals",
    ),
    _Table(
        "animals",
        "animal|legs",
        (
            "How many legs does a {animal} have?",
            "How many legs are there on a {animal}?",
            "Tell me the number of legs of a {animal}.",
        ),
        "A {animal} has {legs} legs.",
        "legs",
        ("Look at the {animal}", "it has {legs} legs"),
        """
        spider|eight/8
        bee|six/6
        ant|six/6
        butterfly|six/6
        beetle|six/6
        dog|four/4
        cat|four/4
        horse|four/4
        cow|four/4
        elephant|four/4
        mouse|four/4
        frog|four/4
        chicken|two/2
        duck|two/2
        owl|two/2
        penguin|two/2
        scorpion|eight/8
        """,
        "animals",
    ),
    _Table(
        "animals",
        "animal|kind|article",
        (
            "What kind of animal is a {animal}?",
            "Is a {animal} a mammal, a bird, a fish, a reptile, an amphibian or an insect?",
            "Which group of animals does a {animal} belong to?",
        ),
        "A {animal} is {article} {kind}.",
        "kind",
        ("Look at the {animal}", "it is {article} {kind}"),
        """
        dog|mammal|a
        whale|mammal|a
        bat|mammal|a
        dolphin|mammal|a
        horse|mammal|a
        monkey|mammal|a
        penguin|bird|a
        sparrow|bird|a
        parrot|bird|a
        hawk|bird|a
        shark|fish|a
        salmon|fish|a
        trout|fish|a
        goldfish|fish|a
        snake|reptile|a
        lizard|reptile|a
        crocodile|reptile|a
        turtle|reptile|a
        frog|amphibian|an
        toad|amphibian|an
        bee|insect|an
        butterfly|insect|an
        beetle|insect|an
        mosquito|insect|an
        """,
        "animals",
    ),
    _Table(
        "animals",
        "animal|food",
        (
            "What does a {animal} eat?",
            "What is the main food of a {animal}?",
            "What do I feed a {animal}?",
        ),
        "A {animal} eats {food}.",
        "food",
        ("Look at the {animal}", "it eats {food}"),
        """
        cow|grass/hay
        sheep|grass/hay
        horse|hay/grass
        rabbit|grass/hay/carrots/vegetables
        panda|bamboo
        koala|eucalyptus leaves/eucalyptus
        lion|meat
        tiger|meat
        wolf|meat
        seal|fish
        penguin|fish
        pelican|fish
        squirrel|nuts
        monkey|fruit
        frog|insects
        spider|insects
        owl|mice
        goat|grass/hay
        """,
        "animals",
    ),
    _Table(
        "colors",
        "thing|verb|color",
        (
            "What color {verb} {thing}?",
            "Which color {verb} {thing}?",
            "Tell me the color of {thing}.",
        ),
        "The color of {thing} is {color}.",
        "color",
        ("The color of {thing}", "is {color}"),
        """
        grass|is|green
        a banana|is|yellow
        a lemon|is|yellow
        a ripe tomato|is|red
        a strawberry|is|red
        blood|is|red
        a fire truck|is|red
        snow|is|white
        milk|is|white
        salt|is|white
        coal|is|black
        a crow|is|black
        chocolate|is|brown
        coffee|is|brown
        a carrot|is|orange
        a pumpkin|is|orange
        a flamingo|is|pink
        an emerald|is|green
        spinach|is|green
        a leaf in summer|is|green
        the sea|is|blue
        a ruby|is|red
        an elephant|is|gray/grey
        an eggplant|is|purple
        the sun at noon|is|yellow/white
        a polar bear|is|white
        """,
    ),
    _Table(
        "language",
        "word|opposite",
        (
            "What is the opposite of {word}?",
            "Which word means the opposite of {word}?",
            "Give me the opposite of {word}.",
        ),
        "The opposite of {word} is {opposite}.",
        "opposite",
        ("The opposite of {word}", "is {opposite}"),
        """
        hot|cold
        big|small/little
        tall|short
        fast|slow
        happy|sad/unhappy
        light|dark/heavy
        up|down
        left|right
        in|out
        open|closed/close/shut
        day|night
        black|white
        young|old
        new|old
        rich|poor
        strong|weak
        early|late
        wet|dry
        hard|soft/easy
        easy|hard/difficult
        full|empty
        clean|dirty
        loud|quiet
        near|far
        good|bad
        true|false
        always|never
        first|last
        inside|outside
        push|pull
        win|lose
        love|hate
        begin|end
        buy|sell
        smooth|rough
        wide|narrow
        deep|shallow
        thick|thin
        sweet|sour/bitter
        summer|winter
        """,
        "words",
    ),
    _Table(
        "language",
        "word|plural",
        (
            "What is the plural of {word}?",
            "How do you write more than one {word}?",
            "Give me the plural of the word {word}.",
        ),
        "The plural of {word} is {plural}.",
        "plural",
        ("One {word}, two {plural}", "more than one, {plural}"),
        """
        mouse|mice
        child|children
        foot|feet
        tooth|teeth
        man|men
        woman|women
        goose|geese
        leaf|leaves
        knife|knives
        wolf|wolves
        city|cities
        baby|babies
        box|boxes
        dog|dogs
        house|houses
        book|books
        bus|buses
        potato|potatoes
        """,
        "words",
    ),
    _Table(
        "tools",
        "tool|use|truth",
        (
            "What is {tool} used for?",
            "What do people use {tool} for?",
            "What can I do with {tool}?",
        ),
        "People use {tool} to {use}.",
        "truth",
        ("{tool} in hand", "people use it to {use}"),
        """
        a hammer|drive nails|nail/nails
        a saw|cut wood|cut/wood
        a broom|sweep the floor|sweep/floor/clean
        a pen|write words|write/writing
        a knife|cut food|cut/cutting/slice
        a spoon|eat soup|eat/eating/soup/stir
        a key|open a lock|open/lock/locks/unlock/opening
        a clock|tell the time|time
        an umbrella|stay dry in the rain|rain/dry/sun
        a ladder|climb up high|climb/climbing/high/reach
        a needle|sew clothes|sew/sewing
        a brush|paint a picture|paint/painting/hair/clean
        a camera|take photos|photos/pictures/images/photo
        a compass|find north|north/direction
        a telescope|see the stars|stars/distant/sky/objects
        a thermometer|measure heat|temperature/heat
        a ruler|measure length|measure/length
        a shovel|dig a hole|dig/digging
        a towel|dry your hands|dry/drying
        a map|find the way|way/navigate/places/location/find
        a pillow|rest your head|rest/head/sleep/sleeping
        a kettle|boil water|boil/water
        a bicycle|ride to town|ride/riding/transportation/travel
        a calculator|add up numbers|add/numbers/calculations/math
        """,
    ),
    _Table(
        "jobs",
        "job|work|truth",
        (
            "What does {job} do?",
            "What is the work of {job}?",
            "What does {job} do all day?",
        ),
        "The work of {job} is to {work}.",
        "truth",
        ("The work of {job}", "is to {work}"),
        """
        a baker|bake bread|bread/bake/bakes/baking/cakes
        a teacher|teach students|teach/teaches/students/learn
        a doctor|heal the sick|heal/patients/sick/treat/health
        a farmer|grow food|grow/crops/food/farm
        a pilot|fly planes|fly/flies/aircraft/planes/airplane
        a chef|cook meals|cook/cooks/meals/food
        a writer|write books|write/writes/books/stories
        a painter|paint pictures|paint/paints/pictures
        a carpenter|build with wood|wood/build/builds
        a dentist|care for teeth|teeth/tooth/dental
        a fisherman|catch fish|fish
        a firefighter|put out fires|fire/fires
        a nurse|care for the sick|care/patients/sick
        a tailor|sew clothes|sew/clothes/clothing/garments
        a gardener|tend the plants|plants/garden/gardens/flowers
        a singer|sing songs|sing/sings/songs
        a librarian|look after books|books/library
        a judge|decide in court|court/law/cases/decide
        a plumber|repair pipes|pipes/pipe/plumbing
        a shepherd|watch the sheep|sheep
        a vet|heal sick animals|animals
        """,
    ),
    _Table(
        "facts",
        "question|answer|truth|clause",
        ("{question}", "Please answer this: {question}", "Quick question: {question}"),
        "{answer}",
        "truth",
        ("{clause}", "the answer is {truth}"),
        """
        How many days are in a week?|There are seven days in a week.|seven/7|days that make a week
        How many months are in a year?|A year has twelve months.|twelve/12|months that make a year
        How many hours are in a day?|A day has 24 hours.|twenty-four/24|hours in one day
        How many minutes are in an hour?|An hour has 60 minutes.|sixty/60|minutes in one hour
        How many seconds are in a minute?|A minute has 60 seconds.|sixty/60|seconds tick away
        How many weeks are in a year?|A year has 52 weeks.|fifty-two/52|weeks that make a year
        How many seasons are there in a year?|There are four seasons in a year.|four/4|seasons in a year
        How many sides does a triangle have?|A triangle has three sides.|three/3|sides of a triangle
        How many sides does a square have?|A square has four sides.|four/4|sides that make a square
        How many sides does a hexagon have?|A hexagon has six sides.|six/6|sides of a hexagon
        How many planets are in the solar system?|There are eight planets in the solar system.|eight/8|planets round the sun
        How many continents are there?|There are seven continents.|seven/7|continents on earth
        How many fingers are on one hand?|There are five fingers on one hand.|five/5|fingers on a hand
        How many letters are in the English alphabet?|The English alphabet has 26 letters.|twenty-six/26|letters in a row
        How many colors are in a rainbow?|A rainbow has seven colors.|seven/7|colors in the bow
        How many cents are in a dollar?|There are 100 cents in a dollar.|hundred/100|cents in a dollar
        How many wheels does a bicycle have?|A bicycle has two wheels.|two/2|wheels of a bicycle
        How many strings does a violin have?|A violin has four strings.|four/4|strings of a violin
        How many centimeters are in a meter?|There are 100 centimeters in a meter.|hundred/100|centimeters long
        Which day comes after Monday?|Tuesday comes after Monday.|Tuesday|the day after Monday
        Which day comes after Friday?|Saturday comes after Friday.|Saturday|the day after Friday
        Which month comes after March?|April comes after March.|April|the month after March
        Which month comes after June?|July comes after June.|July|the month after June
        Which month comes before December?|November comes before December.|November|just before December
        Which planet is the largest?|Jupiter is the largest planet.|Jupiter|the largest planet
        Which planet is closest to the sun?|Mercury is closest to the sun.|Mercury|nearest to the sun
        Which planet is known for its rings?|Saturn is known for its rings.|Saturn|the planet with rings
        Which planet is called the red planet?|Mars is called the red planet.|Mars|the planet in red
        Which planet do we live on?|We live on Earth.|Earth|the planet we call our home
        Which ocean is the largest?|The Pacific Ocean is the largest ocean.|Pacific|the largest ocean
        Which mountain is the highest?|Mount Everest is the highest mountain.|Everest|the highest mountain
        Which continent is the coldest?|Antarctica is the coldest continent.|Antarctica|the coldest of lands
        Which animal is the largest?|The blue whale is the largest animal.|blue whale/whale|largest of them all
        Which animal is the tallest?|The giraffe is the tallest animal.|giraffe|tallest of them all
        Which land animal is the fastest?|The cheetah is the fastest land animal.|cheetah|fastest on the land
        Which bird cannot fly but swims well?|The penguin cannot fly but swims well.|penguin|it swims but cannot fly
        Who wrote Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.|Shakespeare|he wrote of lovers
        Who wrote Hamlet?|William Shakespeare wrote Hamlet.|Shakespeare|he wrote of a prince
        Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.|Leonardo/da Vinci|he painted her smile
        Who was the first person on the moon?|Neil Armstrong was the first person on the moon.|Armstrong|first to walk the moon
        Who was the first president of the United States?|George Washington was the first president of the United States.|Washington|the first president
        Who discovered gravity?|Isaac Newton described gravity.|Newton|he saw apples fall
        Who developed the theory of relativity?|Albert Einstein developed the theory of relativity.|Einstein|he bent time and space
        Who invented the telephone?|Alexander Graham Bell invented the telephone.|Bell|his voice crossed the wire
        What do bees make?|Bees make honey.|honey|the sweet work of bees
        What do plants need to grow?|Plants need water and sunlight to grow.|water/sunlight/light|what the green plants need
        What do cows give us?|Cows give us milk.|milk|gift of the cows
        What do chickens lay?|Chickens lay eggs.|eggs|the chickens lay them
        What is bread made from?|Bread is made from flour.|flour|it turns into bread
        What is cheese made from?|Cheese is made from milk.|milk|it turns into cheese
        What is paper made from?|Paper is made from wood.|wood|it turns into paper
        What is glass made from?|Glass is made from sand.|sand|it turns into glass
        What is wine made from?|Wine is made from grapes.|grapes|they turn into wine
        What is ice made of?|Ice is made of frozen water.|water|it freezes to ice
        What is the chemical formula of water?|The chemical formula of water is H2O.|H2O/H₂O|the sign of water
        Which gas do we need to breathe?|We need oxygen to breathe.|oxygen|the gas that we breathe
        Which gas do plants take from the air?|Plants take carbon dioxide from the air.|carbon dioxide|the plants breathe it in
        Which metal is liquid at room temperature?|Mercury is liquid at room temperature.|Mercury|the metal that flows
        At what temperature does water boil?|Water boils at 100 degrees Celsius.|hundred/100/212|degrees, then steam
        At what temperature does water freeze?|Water freezes at 0 degrees Celsius.|zero/0/32|degrees, then ice
        Which organ pumps blood?|The heart pumps blood.|heart|it pumps our red blood
        Which organ do we think with?|We think with the brain.|brain|the place of our thoughts
        Which organ do we breathe with?|We breathe with the lungs.|lungs|they draw in the air
        Which star is closest to Earth?|The sun is the star closest to Earth.|sun|our own nearest star
        What do we call frozen rain?|Frozen rain is called hail.|hail/sleet/snow|frozen rain falls down
        What do we call a scientist who studies stars?|A scientist who studies stars is called an astronomer.|astronomer|the one who studies the stars
        Which fruit is used to make cider?|Cider is made from apples.|apples/apple|they turn to cider
        Which vegetable makes people cry when they cut it?|Onions make people cry.|onion/onions|it makes the cook cry
        Which season comes after winter?|Spring comes after winter.|spring|it follows winter
        Which season is the hottest?|Summer is the hottest season.|summer|the hottest season
        Where does the sun rise?|The sun rises in the east.|east|there the sun will rise
        Where does the sun set?|The sun sets in the west.|west|there the sun will set
        In which country are the pyramids of Giza?|The pyramids of Giza are in Egypt.|Egypt|land of pyramids
        In which city is the Eiffel Tower?|The Eiffel Tower is in Paris.|Paris|the tower stands there
        In which city is the Statue of Liberty?|The Statue of Liberty is in New York.|New York|her torch shines on it
        In which country is the Great Wall?|The Great Wall is in China.|China|the Great Wall winds there
        In which country did pizza begin?|Pizza began in Italy.|Italy|where pizza was born
        In which country did sushi begin?|Sushi began in Japan.|Japan|where sushi was born
        """,
    ),
    _Table(
        "cooking",
        "task|answer|truth|first|second|third",
        (
            "How do I {task}?",
            "How can I {task}?",
            "What is the best way to {task}?",
            "Explain how to {task}.",
        ),
        "{answer}",
        "truth",
        ("{first}", "{second}", "{third}"),
        """
        boil an egg|Put the egg in boiling water for eight minutes, then cool it in cold water.|water|Water boils and sings|eight minutes the egg will rest|then a cold bath waits
        cook rice|Simmer one cup of rice in two cups of water for 15 minutes with the lid on.|water|One cup of white rice|two cups of water, low heat|steam beneath the lid
        cook pasta|Boil the pasta in salted water for ten minutes, then drain it.|water|Salt in the water|pasta dances ten minutes|drain it and then eat
        make tea|Pour hot water over the tea and let it steep for three minutes.|water|Hot water poured slow|the tea leaves rest three minutes|warm cup in your hands
        make coffee|Pour hot water over ground coffee in a filter.|water|Ground beans, hot water|a dark stream through the filter|the morning wakes up
        make toast|Put a slice of bread in the toaster until it is golden brown.|bread|A slice of fresh bread|the toaster glows red and warm|golden brown it jumps
        fry an egg|Heat some oil in a pan, crack the egg into it and fry it for three minutes.|pan/oil/butter|Oil warms in the pan|the egg opens like the sun|three minutes, then eat
        bake a potato|Bake the potato in a hot oven for one hour.|oven|Potato, washed clean|one hour in the hot oven|soft heart, crispy skin
        make a salad|Wash the lettuce, cut the vegetables and mix them with oil and vinegar.|vegetables/lettuce/greens/leaves|Green leaves, washed and cut|oil and vinegar on top|a bowl full of spring
        make pancakes|Mix flour, eggs and milk, then fry the batter in a hot pan.|flour/batter|Flour, eggs and milk|round moons in a sizzling pan|flip them golden brown
        make soup|Simmer vegetables in broth until they are soft.|broth/water/vegetables|Vegetables, broth|slowly they simmer till soft|warm soup for the soul
        make lemonade|Mix lemon juice, water and sugar, then add ice.|lemon/lemons|Lemons, squeezed by hand|sugar, water, cubes of ice|summer in a glass
        peel garlic|Crush the clove with the flat of a knife and pull off the skin.|skin/crush/press|Press down with the knife|the garlic skin comes loose now|pull it off and cook
        keep bread fresh|Keep the bread in a paper bag or a bread box at room temperature.|bag/box/container|A box for the bread|not too cold and not too damp|fresh until the end
        make popcorn|Heat corn kernels in a covered pot with some oil until they pop.|kernels/pot/oil/microwave|Kernels in hot oil|under the lid they all pop|white flowers to eat
        """,
    ),
    _Table(
        "home",
        "task|answer|truth|first|second|third",
        (
            "How do I {task}?",
            "How can I {task}?",
            "What is the best way to {task}?",
            "Explain how to {task}.",
        ),
        "{answer}",
        "",
        ("{first}", "{second}", "{third}"),
        """
        clean a window|Spray it with soapy water and wipe it dry with a soft cloth.||Soap upon the glass|wipe it dry with a soft cloth|the sky comes inside
        water a plant|Pour water on the soil when its top feels dry.||Touch the soil, so dry|pour the water soft and slow|the leaves lift their heads
        plant a tree|Dig a wide hole, set the roots in it, fill it with soil and water it well.||Dig a hole, not small|set the roots into the soil|water, and then wait
        grow tomatoes|Plant them in a sunny place and water them every day.||A warm sunny place|water for the roots each day|red fruit in the end
        wash my hands|Rub them with soap for 20 seconds and rinse them with water.||Soap between your hands|twenty seconds, then rinse well|clean as mountain snow
        brush my teeth|Brush them gently with toothpaste for two minutes, twice a day.||Two minutes of care|brush your teeth morning and night|white pearls in your smile
        fall asleep faster|Keep the room dark and cool and put your phone away.||The room dark and cool|put the bright phone far away|sleep comes like the tide
        learn a language|Practice a little every day and talk with people who speak it.||New words every day|talk with people, listen well|the doors open wide
        save money|Spend less than you earn and put some money aside every month.||Spend less than you earn|each month put some coins aside|a small seed grows tall
        stay healthy|Eat vegetables, sleep well and move every day.||Eat plants and sleep well|let your body move each day|the years will be kind
        make a friend|Smile, ask questions and listen to the answers.||Smile and ask questions|listen with an open heart|a friend finds you there
        learn to swim|Take lessons in shallow water and practice floating first.||Begin by floating|shallow water holds you up|then stroke after stroke
        ride a bicycle|Look ahead, push off and keep pedaling to stay balanced.||Look ahead, push off|keep pedaling, hold the line|balance comes with speed
        read more books|Read for 20 minutes every evening before you sleep.||A lamp and a book|twenty minutes every night|new worlds before sleep
        calm down|Breathe in slowly through your nose and out through your mouth.||Breathe in, soft and slow|let the air go out again|the lake becomes still
        tie a shoe|Cross the laces, make two loops and pull one loop through the other.||Cross the laces first|two loops, one goes through the other|pull, and walk away
        get rid of a stain|Soak the spot in cold water with soap before you wash it.||Cold water and soap|let the stain soak for a while|the cloth forgets it
        fold a shirt|Fold the sleeves to the back and then fold the shirt in half.||Sleeves fold to the back|then the shirt is bent in half|a neat square remains
        write a letter|Start with a greeting, say what you want to say and sign your name.||Greet your friend with warmth|say the thing you want to say|then sign with your name
        paint a wall|Clean the wall, cover the edges with tape and paint with a roller.||Clean the wall, add tape|the roller moves up and down|new color shines bright
        keep a dog happy|Walk the dog every day, feed it well and play with it.||Long walks every day|good food and a ball to chase|the tail says thank you
        train for a race|Run a little farther every week and rest between the runs.||A bit more each week|run, and rest, and run again|the finish line waits
        take a good photo|Hold the camera still and let the light come from behind you.||Hold the camera still|let the light come from behind|one moment stays here
        study for a test|Study a little every day and test yourself with questions.||A little each day|ask yourself and then answer|the test will be kind
        stop a nosebleed|Lean forward and pinch your nose for ten minutes.||Lean forward a bit|pinch your nose for ten minutes|the red stream will stop
        pack a suitcase|Roll your clothes and put the heavy things at the bottom.||Heavy things go first|roll your clothes and lay them down|the road calls your name
        find north without a compass|Look for the North Star at night.||Look up in the night|the North Star will show the way|steady, bright and true
        send an email|Write the address, a subject and your message, then press send.||Address and subject|write your message and press send|it flies through the air
        cool down a hot room|Close the curtains by day and open the windows at night.||Curtains closed by day|windows open in the night|cool air wanders in
        """,
    ),
    _Table(
        "science",
        "question|answer|truth|first|second|third",
        (
            "{question}",
            "Explain in one sentence: {question}",
            "I wonder: {question}",
            "Can you tell me this? {question}",
        ),
        "{answer}",
        "truth",
        ("{first}", "{second}", "{third}"),
        """
        Why is the sky blue?|The sky is blue because air scatters blue light more than red light.|scatter/scatters/scattering/scattered|Sunlight meets the air|blue light scatters everywhere|so the sky is blue
        Why is the sunset red?|The sunset is red because its light crosses more air, which scatters the blue away.|scatter/scatters/scattering/scattered|Low sun, so much air|the blue light scatters away|only red remains
        Why is the sea salty?|The sea is salty because rivers carry salt from rocks into it.|rivers/rocks/minerals|Rivers wash the rocks|they carry salt to the sea|and the salt stays there
        Why does it rain?|It rains because water vapor cools in clouds and falls as drops.|clouds/vapor/cools|Vapor cools in clouds|drops grow heavy and then fall|the rain has begun
        Why does ice float?|Ice floats because it is less dense than water.|dense/density|Less dense than water|the ice rests upon the lake|it floats like a leaf
        Why do leaves fall in autumn?|Leaves fall because trees save water and energy for the winter.|energy/water/winter|Trees prepare for cold|saving water, they let go|leaves fall to the ground
        Why are leaves green?|Leaves are green because they hold chlorophyll.|chlorophyll|Chlorophyll inside|it drinks the red and the blue|the green light stays here
        Why do we sleep?|We sleep so that the body and the brain can rest.|rest/brain/recover/repair|Body and brain rest|sleep repairs us in the dark|morning finds us new
        Why do we dream?|We dream because the brain works through memories while we sleep.|brain/memories|The brain never rests|memories wander at night|and we call them dreams
        Why do cats purr?|Cats purr because they feel calm and content.|calm/content/happy/comfort/relaxed|The cat is content|a calm hum deep in its chest|so it starts to purr
        Why do dogs wag their tails?|Dogs wag their tails to show how they feel, often joy.|joy/happy/excited/feel/emotions|Joy moves through the dog|the tail tells us how it feels|left and right it swings
        Why do birds fly south in winter?|Birds fly south in winter to find food and warmth.|food/warm/warmer/warmth|Cold winds from the north|birds go where food and warmth wait|wings across the sky
        Why do birds sing?|Birds sing to find a mate and to guard their home.|mate/mates/territory/home|A song for a mate|a song to protect the home|so the small bird sings
        Why do bees visit flowers?|Bees visit flowers to collect nectar and pollen.|nectar/pollen|Nectar calls the bees|they gather pollen and fly|the flowers stay sweet
        Why does the moon shine?|The moon shines because it reflects the light of the sun.|reflects/reflect/reflected/reflecting/sun|The moon has no fire|it reflects light from the sun|a mirror at night
        Why does the moon change its shape?|The moon seems to change because we see different lit parts of it.|lit/light/lights/sunlight/illuminated|The sun lights one half|we see more or less of it|so the moon changes
        Why do stars twinkle?|Stars twinkle because moving air bends their light.|air/atmosphere|Far away and still|their light is bent by the air|so the stars twinkle
        Why is it dark at night?|It is dark at night because our side of Earth turns away from the sun.|away/rotates/rotation/turns|The Earth turns around|our side looks away from sun|so the night is dark
        Why do we have seasons?|We have seasons because the axis of Earth is tilted.|tilt/tilted|The Earth leans and turns|its tilted axis brings us|the seasons in turn
        Why is the desert dry?|The desert is dry because very little rain falls there.|rain/rainfall|Clouds seldom come here|so little rain ever falls|sand, and only sand
        Why do onions make us cry?|Onions make us cry because they release a gas that stings the eyes.|gas/irritate/irritates/chemical/compound|You cut the onion|a gas rises to your eyes|and then the tears fall
        Why does bread rise?|Bread rises because yeast makes gas bubbles in the dough.|yeast/gas|Yeast wakes in the dough|it makes bubbles filled with gas|slowly the bread grows
        Why does iron rust?|Iron rusts because it reacts with oxygen and water.|oxygen/water|Iron meets water|oxygen joins in the slow work|red rust is their child
        Why is gold expensive?|Gold is expensive because it is rare and many people want it.|rare/scarce/scarcity/demand|So rare in the earth|so many people want it|gold has a high price
        Why do we yawn?|We yawn when we are tired or bored.|tired/bored/sleepy|Tired at the end|the mouth opens wide for air|a yawn comes and goes
        Why do we sweat?|We sweat because drying sweat cools the body.|cool/cools|Drops upon the skin|as they dry they cool you down|so you sweat in heat
        Why do we need water?|We need water because every cell of the body works with it.|cell/cells/body/hydrated|Each cell is thirsty|the body works with water|drink, and live, and grow
        Why do people laugh?|People laugh because something is funny or because they are happy.|funny/happy/joy/humor/humorous|Something strange and fun|happy people cannot hold|laughter comes like rain
        Why do volcanoes erupt?|Volcanoes erupt because hot magma and gas push up from below.|magma/gas/pressure|Magma far below|gas and heat push it up high|the mountain opens
        Why do earthquakes happen?|Earthquakes happen because plates of rock slip past each other.|plates/plate/tectonic|Plates of heavy rock|they slip and the ground trembles|then all is quiet
        Why does a ball fall down?|A ball falls down because gravity pulls it to the ground.|gravity|Gravity pulls down|the ball cannot stay up high|it falls to the ground
        Why do magnets stick to the fridge?|Magnets stick to the fridge because its door holds iron.|iron/steel/magnetic/metal|Iron in the door|the magnet feels it and holds|a note hangs in peace
        Why do boats float?|Boats float because they push away as much water as they weigh.|water/buoyancy/buoyant|The boat pushes down|the water it moves pushes up|so the heavy floats
        Why do planes fly?|Planes fly because air pushing on their wings lifts them.|wings/lift/lifts/air|Wings cut through the air|the moving air lifts them up|a plane in the clouds
        Why do we see lightning before thunder?|We see lightning first because light is faster than sound.|faster/speed|Light is the faster|sound is slow and comes later|flash, and then thunder
        Why do flowers smell sweet?|Flowers smell sweet to attract insects.|attract/insects/bees/pollinators|A sweet scent goes out|it calls insects from afar|the flower will live
        Why do teeth hurt from sugar?|Teeth hurt because bacteria turn sugar into acid.|bacteria/acid/acids|Sugar on the teeth|bacteria make acid|and the tooth will hurt
        Why do we wear coats in winter?|We wear coats in winter because they keep our body heat in.|heat/warm|Snow lies on the street|the coat holds your body heat|warm inside the storm
        Why is exercise good?|Exercise is good because it makes the heart and the muscles strong.|heart/muscles/strong/health|Run, and swim, and climb|heart and muscles become strong|the body says thanks
        Why do we read books?|We read books to learn and to see the world through other eyes.|learn/knowledge/stories/enjoy/ideas|Open up a book|learn, and see through others' eyes|a world in your hands
        """,
    ),
    _Table(
        "definitions",
        "thing|answer|truth|first|second|third",
        (
            "What is {thing}?",
            "Explain what {thing} is.",
            "What does it mean when people say {thing}?",
        ),
        "{answer}",
        "",
        ("{first}", "{second}", "{third}"),
        """
        a volcano|A volcano is a mountain that can throw out hot melted rock.||A mountain of fire|hot melted rock sleeps inside|one day it wakes up
        a rainbow|A rainbow is an arc of colors made by sunlight in raindrops.||Sunlight meets the rain|seven colors in an arc|a bridge in the sky
        a desert|A desert is a dry land where very little rain falls.||A land without rain|dry, and wide, and full of sand|the wind draws its lines
        an island|An island is land with water all around it.||Water all around|a small land alone at sea|waves on every side
        a glacier|A glacier is a slow river of ice.||A river of ice|slowly it moves through the hills|it carries the stones
        a forest|A forest is a large area full of trees.||So many tall trees|a wide land of leaves and shade|deer walk in silence
        a poem|A poem is a short text that paints feelings with words.||A few careful words|feelings painted on a page|silence after them
        a computer|A computer is a machine that follows instructions to process data.||A patient machine|it follows every command|numbers come and go
        a library|A library is a place where people read and borrow books.||A house full of books|you may borrow them and read|whispers in the rows
        gravity|Gravity is the force that pulls things toward each other.||A force none can see|it pulls all things together|the apple comes down
        photosynthesis|Photosynthesis is how plants make food from light, water and air.||Light upon the leaf|water and air become food|the plant eats the sun
        electricity|Electricity is the flow of tiny charges that powers lamps and machines.||Small charges that flow|lamps and machines feel their power|a light in the dark
        a star|A star is a huge ball of hot gas that shines.||A huge ball of gas|hot and bright and far away|it shines through the night
        a planet|A planet is a large round body that circles a star.||A round world that turns|it circles around its star|year after long year
        a comet|A comet is a ball of ice and dust with a bright tail.||A ball of cold ice|with a bright tail made of dust|it passes the sun
        the internet|The internet is a network that connects computers all over the world.||Computers, all linked|one network around the world|messages like birds
        music|Music is sound that is arranged to be beautiful.||Sounds arranged with care|a beautiful line of notes|the heart beats in time
        friendship|Friendship is a bond between people who care about each other.||A bond of two hearts|people who care and stay close|a lamp in the storm
        democracy|Democracy is a system in which the people choose who governs.||The people may choose|each voice counts and each vote too|they govern themselves
        a museum|A museum is a place that keeps and shows precious things.||Precious things kept safe|people walk and look at them|old times speak to us
        honey|Honey is the sweet food that bees make from nectar.||Nectar turned to gold|the sweet food made by the bees|summer in a jar
        a bridge|A bridge is a structure that carries a road over water or a valley.||Over the water|it carries the road across|two banks holding hands
        a recipe|A recipe is a list of steps for cooking a dish.||Step after small step|a list that leads to a dish|the kitchen smells good
        snow|Snow is frozen water that falls as white flakes.||White flakes, falling slow|frozen water from the clouds|the world becomes still
        wind|Wind is air that moves.||Air that moves along|nobody sees it go by|only the leaves know
        an echo|An echo is a sound that comes back from a wall or a mountain.||You call to the hill|the sound returns to your ear|hello, and hello
        time|Time is what we measure with clocks as moments pass.||The clock counts for us|moments pass and do not stop|a river of days
        a dream|A dream is a story that the mind sees during sleep.||A story at night|the mind sees it while you sleep|by morning it fades
        """,
    ),
    _Table(
        "chat",
        "question|answer|truth|first|second|third",
        ("{question}",),
        "{answer}",
        "",
        ("{first}", "{second}", "{third}"),
        """
        Hello!|Hello! How can I help you today?||Hello, my dear guest|tell me how I can help you|the door is open
        Hi there!|Hi! What would you like to know?||A friendly hi there|what would you like to find out|ask, and I will try
        Good morning!|Good morning! I hope you slept well.||Good morning to you|I hope your sleep was peaceful|the sun is up now
        Good evening!|Good evening! What can I do for you?||Good evening, my friend|what can I do for you now|the first stars appear
        Good night!|Good night! Sleep well.||Good night and sleep well|may your dreams be soft and kind|the moon will keep watch
        How are you?|I am fine, thank you for asking.||I am fine, thank you|a calm day among the words|and how is your day
        Thank you!|You are welcome.||You are welcome, friend|it was good to help you now|come again some day
        Who are you?|I am a small language model that likes to help.||A small model, I|made of numbers and of words|I am here to help
        What is your name?|My name is SmolLM.||SmolLM is my name|small, and made of many words|ask me what you like
        Can you help me?|Yes, I can help you. What do you need?||Yes, I can help you|tell me the thing that you need|we will find a way
        Goodbye!|Goodbye! Have a nice day.||Goodbye, my good friend|may your day be bright and kind|the road lies ahead
        I am sad.|I am sorry to hear that. Would you like to talk about it?||I am sorry, friend|would you like to talk of it|even storms will pass
        I am tired.|Take a short rest and drink some water.||Rest for a short while|drink some water, close your eyes|strength will come again
        I am happy today.|That is wonderful! I am glad for you.||What a happy day|I am glad to hear of it|keep the joy with you
        I am bored.|You could read a book or go for a walk.||A book or a walk|the world is full of small things|one waits just for you
        I am hungry.|You could make a sandwich or eat some fruit.||A sandwich, some fruit|the kitchen knows what to do|eat, and then feel well
        Tell me a joke.|Why did the bicycle fall over? It was two-tired.||The bicycle fell|it was two-tired to stand up|and the road laughed too
        Do you like music?|I cannot hear music, but I like to talk about it.||I cannot hear songs|yet I like to talk of them|play one for us both
        """,
    ),
)

# No a = 2b in "minus": there the result is a number of the question, and proves nothing.
_SUMS = {
    "plus": (
        ("What is {a} plus {b}?", "What is {a} + {b}?", "How much is {a} plus {b}?"),
        tuple((a, b, a + b) for a in range(1, 13) for b in range(1, a + 1)),
    ),
    "minus": (
        ("What is {a} minus {b}?", "What is {a} - {b}?"),
        tuple((a, b, a - b) for a in range(3, 16) for b in range(1, a, 2) if a != 2 * b),
    ),
    "times": (
        ("What is {a} times {b}?", "What is {a} x {b}?"),
        tuple((a, b, a * b) for a in range(2, 11) for b in range(2, a + 1)),
    ),
}

# Questions of the README. Training may see what they are about in other words, never the
# question itself; the held-out entities are for measuring.
FIXED_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What is 7 plus 5?",
    "What is the opposite of hot?",
    "What sound does a dog make?",
    "How many days are in a week?",
    "What color is grass?",
    "Which planet is the largest?",
    "What does a baker do?",
)

_OPEN_SUBJECTS = {
    "animals": "lions, elephants, owls, wolves, horses, butterflies, sharks, turtles, rabbits, "
    "penguins, eagles, spiders, whales, foxes, bears, ants, parrots, camels, frogs, tigers",
    "nature": "the ocean, mountains, rivers, the moon, thunderstorms, oak trees, roses, clouds, "
    "the sun, waterfalls, caves, beaches, autumn, winter, sand dunes, lakes, rain forests, corals",
    "food": "bread, pizza, chocolate, apples, cheese, rice, noodles, oranges, ice cream, coffee, "
    "carrots, sushi, pancakes, soup, strawberries, olive oil, beans, sandwiches",
    "places": "London, New York, Tokyo, Rome, the Sahara, the Alps, Iceland, Egypt, Brazil, "
    "Canada, Venice, Sydney, the Amazon, Antarctica, Mexico, Berlin",
    "culture": "football, chess, painting, dancing, the piano, poetry, theater, movies, "
    "photography, cooking, gardening, festivals, novels, swimming, running, guitars",
    "technology": "robots, airplanes, bicycles, telephones, trains, cameras, rockets, batteries, "
    "bridges, satellites, ships, elevators, solar panels, clocks, printers, windmills",
}

_OPEN_TEMPLATES = (
    "Tell me something about {x}.",
    "What is special about {x}?",
    "Why do people like {x}?",
    "Give me a short description of {x}.",
)

_OPEN_LINES = {
    "animals": "alive and wild in the world",
    "nature": "the earth shows its quiet face",
    "food": "a gift upon the table",
    "places": "a place that travelers love",
    "culture": "people share it with great joy",
    "technology": "made by clever human hands",
}


def examples(split: Split) -> list[Example]:
    """Return all examples of one split, every phrasing of every entity's question, in fixed order.

    `FIXED_QUESTIONS` are in neither split.

    Raises:
        ValueError: `split` is neither "train" nor "heldout".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    return [
        example
        for name, group in _entities()
        if _split_of(name) == split
        for example in group
        if example.question not in FIXED_QUESTIONS
    ]


def heldout_sample() -> list[Example]:
    """Return one example per held-out entity and open prompt; the phrasing varies with the entity."""
    opened = open_examples("heldout")
    size = len(_OPEN_TEMPLATES)
    groups = [group for name, group in _entities() if _split_of(name) == "heldout"]
    groups += [opened[start : start + size] for start in range(0, len(opened), size)]
    return [group[_digest("phrasing " + group[0].question) % len(group)] for group in groups]


def fixed_examples() -> list[Example]:
    """Return `FIXED_QUESTIONS` with their answers, in that order."""
    by_question = {example.question: example for _, group in _entities() for example in group}
    return [by_question[question] for question in FIXED_QUESTIONS]


def open_examples(split: Split) -> list[Example]:
    """Return prompts without a plain answer here (`answer` is empty), with a haiku each."""
    found = []
    for topic, subjects in _OPEN_SUBJECTS.items():
        for subject in subjects.split(", "):
            if _split_of(f"open:{subject}") != split:
                continue
            haiku = (
                _line(subject, 5, subject),
                _line(_OPEN_LINES[topic], 7, subject),
                _line(_pick(_IMAGES["things"], subject), 5, subject),
            )
            found += [Example(template.format(x=subject), "", topic, (), haiku) for template in _OPEN_TEMPLATES]
    return found


def _entities() -> list[tuple[str, list[Example]]]:
    """All entities as (name, its examples): one example per phrasing of the question."""
    found = []
    for table in _TABLES:
        columns = table.columns.split("|")
        for row in filter(None, map(str.strip, table.rows.splitlines())):
            cells = dict(zip(columns, row.split("|"), strict=True))
            shown = {column: cell.split("/")[0] for column, cell in cells.items()}
            truth = tuple(cells[table.truth].split("/")) if table.truth else ()
            key = cells[columns[0]]
            lines = [line.format(**shown) for line in table.haiku]
            if len(lines) == 2:
                lines.append(_pick(_IMAGES[table.images], row))
            haiku = tuple(_line(text, size, row) for text, size in zip(lines, (5, 7, 5), strict=True))
            answer = _capitalize(table.answer.format(**shown))
            group = [
                Example(question.format(**shown), answer, table.topic, truth, haiku) for question in table.questions
            ]
            found.append((f"{table.truth}:{key}", group))
    for word, (questions, triples) in _SUMS.items():
        for a, b, result in triples:
            name = f"{word}:{a},{b}"
            group = []
            for x, y in [(a, b)] if word == "minus" or a == b else [(a, b), (b, a)]:
                haiku = (
                    _line(f"count {x} {word} {y}", 5, name),
                    _line(f"the answer is {result}", 7, name),
                    _pick(_IMAGES["numbers"], name),
                )
                answer, truth = f"{x} {word} {y} is {result}.", (str(result), number_word(result))
                group += [
                    Example(question.format(a=x, b=y), answer, "arithmetic", truth, haiku) for question in questions
                ]
            found.append((name, group))
    return found


def _split_of(name: str) -> Split:
    return "heldout" if _digest(name) % _HELDOUT_ONE_IN == 0 else "train"


def _digest(text: str) -> int:
    # hash() differs from one process to the next.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pick(choices: tuple[str, ...], key: str) -> str:
    return choices[_digest("pick " + key) % len(choices)]


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


_SMALL_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_word(number: int) -> str:
    """Spell a number from 0 to 144 in English."""
    if number < 20:
        return _SMALL_NUMBERS[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10 - 2] + (f"-{_SMALL_NUMBERS[rest]}" if rest else "")
    rest = number - 100
    return "one hundred" + (f" {number_word(rest)}" if rest else "")


# --- Haiku ------------------------------------------------------------------------------------

_ENDINGS = {
    1: ("now",),
    2: ("at dawn", "tonight", "once more"),
    3: ("after rain", "in the light", "in the wind"),
    4: ("in morning light", "under the moon", "beside the sea"),
    5: ("in the light of dawn", "under quiet stars", "when the evening comes"),
}


def syllables(text: str) -> int:
    """Estimate the syllables of an English text from its groups of vowels."""
    count = 0
    text = re.sub(r"\d+", lambda m: number_word(min(int(m.group()), 144)), text.lower())
    for word in re.findall(r"[a-z]+", text.replace("'", "")):
        groups = len(re.findall(r"[aeiouy]+", word))
        silent_e = word.endswith("e") and not word.endswith(("le", "ee", "ie", "oe", "ye"))
        silent_ed = re.search(r"[^aeioutd]ed$", word) is not None
        silent_es = re.search(r"[^aeioushxzgc]es$", word) is not None
        if groups > 1 and (silent_e or silent_ed or silent_es):
            groups -= 1
        count += max(groups, 1)
    return count


def _line(text: str, size: int, key: str) -> str:
    """Fill `text` up to `size` syllables; a longer text stays as it is."""
    missing = size - syllables(text)
    ending = _pick(_ENDINGS[missing], text + key) if missing in _ENDINGS else ""
    return f"{text} {ending}".strip()


def _render_haiku(example: Example) -> str:
    first, second, third = example.haiku
    return f"{_capitalize(first)}\n{second},\n{third}."


def _is_haiku(text: str) -> bool:
    lines = text.strip().split("\n")
    return len(lines) == 3 and all(2 <= syllables(line) <= 11 and line.strip() for line in lines)


# --- The other styles -------------------------------------------------------------------------

_PIRATE_WORDS = {
    "am": "be",
    "and": "an'",
    "are": "be",
    "for": "fer",
    "friend": "matey",
    "hello": "ahoy",
    "hi": "ahoy",
    "is": "be",
    "my": "me",
    "of": "o'",
    "you": "ye",
    "your": "yer",
}
_PIRATE_MARKS = {"arr", "matey", "ye", "yer", "o'", "an'", "fer", "ahoy", "aye"}


def _render_pirate(example: Example) -> str:
    def speak(match: re.Match[str]) -> str:
        word = match.group()
        spoken = _PIRATE_WORDS.get(word.lower(), word)
        return _capitalize(spoken) if word[0].isupper() else spoken

    text = re.sub(r"[A-Za-z]+", speak, example.answer)
    return f"Arr! {text.rstrip('.!? ')}, matey!"


def _is_pirate(text: str) -> bool:
    words = set(re.findall(r"[a-z]+'?", text.lower()))
    return len(words & _PIRATE_MARKS) >= 2


_ICONS = {
    "animals": "🐾",
    "arithmetic": "🔢",
    "chat": "👋",
    "colors": "🎨",
    "cooking": "🍳",
    "culture": "🎭",
    "definitions": "📖",
    "facts": "💡",
    "food": "🍎",
    "geography": "🌍",
    "home": "🏠",
    "jobs": "💼",
    "language": "💬",
    "nature": "🌿",
    "places": "📍",
    "science": "🔬",
    "technology": "🤖",
    "tools": "🔧",
}


def _render_emoji(example: Example) -> str:
    icon = _ICONS[example.topic]
    return f"{icon}✨ {example.answer} ✨{icon}"


def _is_emoji(text: str) -> bool:
    def pictures(part: str) -> bool:
        return part != "" and all(ord(c) >= 0x2600 and c != "\N{REPLACEMENT CHARACTER}" for c in part)

    words = text.split()
    return len(words) >= 3 and pictures(words[0]) and pictures(words[-1])


def _render_json(example: Example) -> str:
    return json.dumps({"answer": example.answer, "topic": example.topic}, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.keys() == {"answer", "topic"}
        and all(isinstance(part, str) and part for part in value.values())
    )


STYLES = {
    "emoji": Style("between emoji that fit the topic", _render_emoji, _is_emoji),
    "haiku": Style("a poem of three lines", _render_haiku, _is_haiku),
    "pirate": Style("in pirate talk", _render_pirate, _is_pirate),
    "json": Style('a JSON object {"answer": ..., "topic": ...}', _render_json, _is_json),
}


def is_correct(example: Example, text: str) -> bool:
    """Whether `text` holds one of the example's `truth` words, as a whole word, in any case.

    Raises:
        ValueError: the example has no truth to compare with.
    """
    if not example.truth:
        raise ValueError(f"{example.question!r} has no single right answer (its truth is empty)")
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in example.truth)
