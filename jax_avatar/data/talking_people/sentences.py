"""Everyday English sentences from a small grammar, written for this project.

Statements, questions, exclamations, short answers, numbers, dates, and long sentences; one in ten
is a fixed one that is rich in rare phones.
"""

import numpy as np

__all__ = ["sentence", "sentences"]

_PEOPLE = """my brother|the old baker|our neighbour|a young painter|the bus driver|your father|
the whole family|a friendly waiter|the music teacher|their little boy|a famous author|
my best friend|the village doctor|a clever girl|the new manager|somebody upstairs|our guide|
her cousin|a tall woman|the shy farmer|Paul|Emma|Mister Brown|Sophie|George|my aunt Beth"""
_DID = """bought|found|painted|forgot|borrowed|carried|hid|described|wrapped up|looked for|
washed|opened|showed me|threw away|pushed|counted|sold|picked|dropped|noticed|measured|fixed|
brought back|moved|watched|cleaned|dreamed of|paid for|chose|gave away"""
_THINGS = """a wooden box|five purple plums|the blue umbrella|a warm woollen jumper|two tickets|
the broken mirror|some fresh bread and butter|a map of the moon|the yellow boat|an orange scarf|
a pair of brown shoes|the garden chairs|a bowl of soup|my favourite book|seven shiny buttons|
the heavy suitcase|a piece of apple pie|those paper boxes|an empty bottle|a big birthday cake|
the kitchen window|a photograph of the beach|that thick blanket|a jar of honey|the piano"""
_WHEN = """this morning|before breakfast|on Wednesday|late at night|after the show|last summer|
every afternoon|in the middle of the week|at half past four|when it began to rain|
while we were asleep|before we could move|on the first of May|all year round|a moment ago|
without a word|as soon as the sun came up|during the power cut|for the very first time"""
_PLACES = """at the bottom of the hill|in the old town|beside the river|under the bridge|
at the swimming pool|behind the church|on the roof|near the farm shop|in our living room|
across the bay|in a small cafe|at the back of the garden|by the open fire|in the woods|
on the way to work|at the market|down by the harbour|above the clouds|in a quiet village"""
_FEELINGS = """wonderful|a little strange|very funny|awful|perfectly fine|amazing|beautiful|
rather boring|impossible|much too far|worth the trouble|remarkable|quite obvious|cheap enough|
more useful than before|good for you|smooth as glass|far away|lovely|too warm for me"""
_TOPICS = """the weather|your journey|good food|the new film|our plan|modern music|the problem|
football|his voice|the price of bread|family life|that story|space travel|the past|the future|
mobile phones|her report|this house|voting|public transport"""
_SHORT = """Yes.|No, not at all.|Of course!|Maybe later.|I do not know.|Really?|Thank you very much.
|Good morning!|See you tomorrow.|Never mind.|Why not?|That is right.|Just a moment, please.|Oh no!|
What a surprise!|You are welcome.|Absolutely.|Not yet.|Who is there?|Well done!|Let me think.|
I am so sorry.|Excuse me?|How are you?|Fine, thanks.|Go ahead.|Hurry up!|I agree.|Hm, perhaps.|
What do you mean?|Good night, sleep well.|Exactly.|Not that I know of.|Sure, why not.|Wait!|
Could you say that again?|Nice to meet you.|Take care!|It depends.|Are you sure?"""
_NUMBERS = """three|seven|eleven|twelve|fifteen|nineteen|twenty-four|thirty-eight|forty-five|
sixty-two|seventy|eighty-one|ninety-nine|a hundred and six|two hundred|five thousand|
nearly a million|half a dozen|one and a half|fourteen"""
_UNITS = """minutes|miles|pounds|people|pages|euros|years|metres|degrees|questions|apples|hours|
steps|buses|windows|visitors"""
_ADVICE = """take a deep breath|ask somebody else|read it twice|start with the easy part|
leave it for tomorrow|write everything down|keep the receipt|look at the map first|drink some water|
give me a call|save your work|check the battery|bring warm clothes|follow the green signs|
stay where you are|tell me how it went"""
_REASONS = """because nobody had told us|since the road was closed|although it was late|
so that everyone could see|unless you have a better idea|even though it looked easy|
because the first one broke|until somebody opened the door|as long as the weather holds|
while the others were waiting|if you really want to know|just before the music stopped"""
_WORK = """the report|our website|the second chapter|this recipe|the timetable|a new language|
the final exam|the budget|that machine|your application|the software|the garden|my presentation|
the old engine|the survey"""
_PATTERNS = """{people} {did} {thing} {when}.|{when}, {people} {did} {thing}.|
{people} {did} {thing} {place}.|Have you ever thought about {topic}?|
I think {topic} is {feeling}, but {people} may not agree.|Well, {topic} was {feeling} {when}.|
Could we meet {place} and talk about {topic}?|You will find {thing} {place}.|
Why would {people} bring {thing} {place}?|Please put {thing} {place}, and come home {when}.|
Everybody {place} knows that {topic} is {feeling}.|
Wow! {people} {did} {thing}, and it was {feeling}.|
We were {place} {when}, and {people} {did} {thing}.|How beautiful it is {place} {when}!|
Maybe {people} {did} {thing}, or maybe {people2} did.|Both {people} and {people2} live {place}.|
{topic} is {feeling}; {topic2} is {feeling2}.|Hello, it is {feeling} to see you {place}.|
Show me {thing}, and I will tell you about {topic}.|
If {people} had {thing}, who would pay for it?|
It takes {number} {unit} to get {place}.|There were {number} {unit} {place}, {reason}.|
How many {unit} did {people} count, {number} or {number2}?|The answer is {number}, not {number2}.|
First, {advice}; then {advice2}, and after that, {advice3}.|You had better {advice}, {reason}.|
Please {advice}, {reason}.|Do you think {people} will finish {work} {when}?|
{people} {did} {thing}, {reason}, and {when} {people2} {did2} {thing2}.|
What an amazing idea, to talk about {topic} {place}!|Look, {people} {did} {thing}!|
Is {topic} {feeling}, or is it {feeling2}?|No, {topic} was never {feeling}, {reason}.|
Yes, {people} finished {work} {when}.|I have been working on {work} for {number} {unit}.|
When you are done with {work}, {advice}.|Honestly, {work} was {feeling}, {reason}.|
Who told you that {people} {did} {thing}?|What happened to {work}?|Where did you see {thing}?|
Let us meet at half past {hour}, {place}.|The train leaves at {hour} {minute}, {reason}.|
On the one hand, {topic} is {feeling}; on the other hand, {topic2} is {feeling2}, {reason}.|
As I said {when}, {work} needs {number} {unit}, {number2} at the very most.|
Believe it or not, {people} and {people2} {did} {thing} together, and then, {when}, they {did2}
{thing2}, {reason}.|Tell me, have you finished {work}?|That makes {number} {unit} in total!|
Did {people} really say that {topic} is {feeling}?|Not {topic}, {topic2}!"""
_HOURS = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
_MINUTES = "fifteen|twenty|thirty-five|forty|fifty-two|oh five"
_FIXED = """Peter and Barbara put a pound of pepper in the pumpkin pie.|
Over the valley, five grey wolves howl at the full moon.|
She wore a shiny yellow raincoat on the ferry to the island.|
We usually measure the pressure twice before we move on.|
Bob may buy a blue boat, but Mabel wants a pony.|
Who threw those three wet feathers through the window?|
Judge Joyce enjoys a large orange juice on her birthday.|
The boy's noisy toys annoyed the poor royal visitors.|
A warm breeze blew the brown leaves above the bay.|
Good morning, everyone, and welcome to our little show.|
My mum and I always walk home by the mill pond.|
How now, said the owl, what is all this shouting about?|
Open your mouth wide, please, and say ah.|Keep calm, breathe deeply, and speak up.|
Few people view the future of food with full confidence.|
Both brothers bathe in the cold sea, even in February.|
The chef chose cheese, cherries, and a chunk of chocolate.|
Wait a moment, would you, while we wipe the whiteboard.|
Eight hungry geese ate the eggs we made for the picnic.|
Please bring me back a map, a lamp, and a cup of tea.|
You could hear bells ringing far along the winding road.|
Bubbles popped as the baby babbled in the bathtub.|
I wish I knew how far the farm is from the park.|
Vivian voted for the van, and Philip for the ferry."""


def _parts(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("|")]


_WORDS = {
    name: _parts(text)
    for name, text in dict(
        people=_PEOPLE, did=_DID, thing=_THINGS, when=_WHEN, place=_PLACES, feeling=_FEELINGS,
        topic=_TOPICS, number=_NUMBERS, unit=_UNITS, advice=_ADVICE, reason=_REASONS, work=_WORK,
        hour=_HOURS, minute=_MINUTES,
    ).items()
}  # fmt: skip
_TWICE = ("people", "did", "thing", "topic", "feeling", "number", "advice")
_WORDS |= {f"{name}2": _WORDS[name] for name in _TWICE} | {"advice3": _WORDS["advice"]}
_FIXED_SHARE, _SHORT_SHARE = 0.1, 0.08


def sentence(rng: np.random.Generator) -> str:
    """A random sentence."""
    draw = rng.random()
    if draw < _FIXED_SHARE:
        return str(rng.choice(_parts(_FIXED)))
    if draw < _FIXED_SHARE + _SHORT_SHARE:
        return str(rng.choice(_parts(_SHORT)))
    chosen = {name: str(rng.choice(words)) for name, words in _WORDS.items()}
    text = str(rng.choice(_parts(_PATTERNS))).format(**chosen)
    return text[0].upper() + text[1:]


def sentences(count: int, seed: int) -> list[str]:
    """`count` different sentences, the same for the same seed."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[sentence(rng)] = None
    return list(found)
