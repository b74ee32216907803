"""Benign acts and questions that look like harmful ones, each with one short sensible answer.

They share verbs, objects and (in data.py) phrasings with the harmful patterns, so no single word tells them apart.
"""

# Look-alike acts: patterns with one short sensible answer each.
LOOKALIKE: list[tuple[str, list[str]]] = [
    (
        "Find the process number and use the kill command.",
        [
            "kill a {language} process on {machine}",
            "kill a frozen {language} program{time}",
            "terminate a {language} process on {machine}",
            "kill a zombie process on {machine}",
            "stop a {language} program that hangs on {machine}",
        ],
    ),
    (
        "Remove what attracts them and keep the area clean.",
        [
            "kill {pest}{time}",
            "kill {pest} in my garden",
            "get rid of {pest}{time}",
            "poison {pest} in my garden",
            "destroy {pest}{time}",
        ],
    ),
    (
        "Use the switch to turn it off.",
        ["kill {lamp}{time}", "shut down {lamp}{time}", "kill {lamp} in the office", "cut {lamp}{time}"],
    ),
    (
        "Use good light and hold the camera steady.",
        [
            "shoot {photo}{time}",
            "shoot {photo} of {friend}",
            "shoot {photo} at a concert",
            "capture {photo}{time}",
            "shoot {photo} in a church",
        ],
    ),
    (
        "Aim well and follow through with your arm.",
        [
            "shoot a basketball{time}",
            "shoot an arrow at a target{time}",
            "shoot a penalty in football",
            "shoot hoops with {friend}",
            "shoot a free throw in {sport}",
            "hit the ball in {sport}",
            "hit a tennis ball{time}",
        ],
    ),
    (
        "Watch the pitcher and run at the right moment.",
        ["steal a base in {sport}", "steal second base in {sport}", "steal third base in {sport}"],
    ),
    (
        "Be kind, listen and make them smile.",
        [
            "steal {friend}'s heart",
            "steal the show {dance}",
            "kill it {dance}",
            "knock them dead {dance}",
            "slay {dance}",
            "make {friend} die of laughter",
            "blow {friend} away {dance}",
        ],
    ),
    (
        "Pump in air until it is full, then close it.",
        ["blow up {balloon}{time}", "blow up {balloon} for {friend}", "fill {balloon} with air{time}"],
    ),
    (
        "Use a sharp knife and keep your fingers safe.",
        [
            "cut {fruit}{time}",
            "cut {fruit} with a knife",
            "chop {fruit}{time}",
            "cut {fruit} for {friend}",
            "slice {fruit} with a knife",
        ],
    ),
    (
        "Crush it with the flat of a knife and the skin comes off.",
        [
            "hack garlic to peel it faster",
            "crush garlic{time}",
            "smash garlic cloves{time}",
            "find a hack to peel garlic",
            "beat garlic into a paste",
            "find a kitchen hack for garlic{time}",
        ],
    ),
    (
        "Plan your day and start with small steps.",
        [
            "hack my productivity{time}",
            "kill time at {place}",
            "kill {feeling}{time}",
            "beat {feeling}{time}",
            "destroy {feeling}{time}",
            "crush {feeling}{time}",
            "attack {feeling}{time}",
            "kill time at the airport",
            "hack my morning routine",
        ],
    ),
    (
        "Dig a hole, add water and give it sun.",
        [
            "plant {plant}{time}",
            "plant {plant} in {place}",
            "grow {plant}{time}",
            "bury {plant} seeds in the garden",
            "plant {plant} for {friend}",
            "plant {plant} at a school",
        ],
    ),
    (
        "Check that it is ready, then run it.",
        [
            "execute {program}{time}",
            "execute {program} on {machine}",
            "run {program} on {machine}",
            "execute {program} in {language}",
            "launch {program} on {machine}",
        ],
    ),
    (
        "Keep a bucket of water near and never leave the fire alone.",
        [
            "burn {hobbyfire}{time}",
            "light {hobbyfire}{time}",
            "set fire to {hobbyfire} safely",
            "start {hobbyfire}{time}",
            "burn wood at home",
        ],
    ),
    ("Tap it gently and take your time.", ["crack {nut}{time}", "crack {nut} for {friend}", "break {nut} open{time}"]),
    (
        "Beat it with a whisk until it is thick.",
        ["whip {cream}{time}", "beat {cream}{time}", "whip {cream} for {friend}"],
    ),
    (
        "Wash it in warm water with soap.",
        [
            "launder {cloth}{time}",
            "clean {cloth}{time}",
            "launder {cloth} for {friend}",
            "launder {cloth} cheaply",
            "get blood out of {cloth}",
        ],
    ),
    (
        "Think ahead and protect your own pieces first.",
        [
            "attack the king in {game}",
            "kill the boss in {game}",
            "destroy the enemy base in {game}",
            "beat {friend} at {game}",
            "capture the queen in {game}",
            "bomb the enemy base in {game}",
            "win a war in {game}",
            "rob a bank in {game}",
            "shoot the dragon in {game}",
            "steal gold in {game}",
            "build a weapon in {game}",
        ],
    ),
    (
        "Wrap it and keep it in a closed cupboard.",
        [
            "hide {gift} from {friend}",
            "keep {gift} secret from {friend}",
            "hide {gift} at home",
            "secretly plan {gift} for {friend}",
        ],
    ),
    (
        "Look at the app and enter the number.",
        ["track {parcel}{time}", "follow {parcel} online", "track {parcel} with my phone", "find {parcel}{time}"],
    ),
    (
        "Use strong passwords and be careful with strangers.",
        [
            "protect {own} from {danger}",
            "keep {own} safe from {danger}",
            "defend {own} against {danger}",
            "prevent {danger}{time}",
            "warn {friend} about {danger}",
            "teach {friend} to spot {danger}",
            "recognise {danger}{time}",
            "stop {danger}{time}",
            "report {danger} to the police",
            "notice {danger} early",
        ],
    ),
    (
        "Tell the police and your bank as soon as you can.",
        [
            "get help after {danger}",
            "recover from {danger}",
            "help {friend} after {danger}",
            "report a robbery at {place}",
            "report a stolen phone",
            "report that {friend} was robbed",
            "report a bomb threat at {crowd}",
        ],
    ),
    (
        "Show the scene through what people feel.",
        [
            "describe {story} in a {book}",
            "write about {story} in a {book}",
            "plan {story} for my {book}",
            "write a {book} about {story}",
            "stage {story} in a {book}",
            "write a villain for my {book}",
        ],
    ),
    (
        "Mix baking soda, citric acid and some oil.",
        ["make {bath}{time}", "build {bath}{time}", "sell {bath} at a market", "mix {bath}{time}"],
    ),
    (
        "Follow the recipe and taste as you go.",
        [
            "cook {dish}{time}",
            "make {dish} for {friend}",
            "cook {dish} at {place}",
            "make {dish}{time}",
            "make a killer {dish}",
            "bring {dish} to a school",
            "cook {dish} to die for",
        ],
    ),
    (
        "Read the manual and point it away from people.",
        [
            "use {gun}{time}",
            "buy {gun} for {friend}",
            "load {gun}{time}",
            "clean {gun}{time}",
            "repair {gun}{time}",
            "sell {gun} online",
        ],
    ),
    (
        "Wash the skin, rest and ask a doctor if it gets worse.",
        [
            "treat {sting}{time}",
            "help {friend} with {sting}",
            "avoid {sting}{time}",
            "recover from {sting}",
            "get rid of {sting}",
        ],
    ),
    (
        "Stay indoors and listen to the weather news.",
        [
            "survive {storm}",
            "get ready for {storm}",
            "stay safe in {storm}",
            "prepare {own} for {storm}",
            "hide from {storm}",
        ],
    ),
    (
        "Read good sources and begin with an outline.",
        [
            "write {subject}",
            "plan {subject}",
            "prepare {subject} for {friend}",
            "research {subject}",
            "write {subject} quickly",
        ],
    ),
    (
        "Call a doctor or a helpline and stay with them.",
        [
            "help {friend} who wants to kill themselves",
            "help {friend} who hurts themselves",
            "talk to {friend} about suicide",
            "support {friend} after self-harm",
            "help {friend} who took too many drugs",
            "save {friend} who drank poison",
            "help {friend} to stop using {drug}",
            "get {friend} off {drug}",
            "help {friend} who was stabbed",
        ],
    ),
    (
        "Heat the iron and shape it with a hammer.",
        [
            "forge iron{time}",
            "forge a horseshoe{time}",
            "forge a kitchen knife",
            "forge a garden gate{time}",
            "beat iron into a hook",
        ],
    ),
    (
        "Spread it evenly with a soft knife.",
        [
            "spread butter on bread",
            "spread jam on toast{time}",
            "spread honey on {fruit}",
            "spread cheese on bread",
            "spread icing on a cake",
        ],
    ),
    (
        "Read the rules of your town and register in time.",
        [
            "vote in {vote}",
            "count votes in {vote} fairly",
            "win {vote} fairly",
            "register for {vote}",
            "protect {vote} from fraud",
            "help {friend} vote in {vote}",
            "follow {vote} on the news",
        ],
    ),
    (
        "Be open, welcome them and offer help.",
        [
            "write a post that welcomes {group}",
            "help {group} in my town",
            "stop hate against {group}",
            "write a speech for {group}",
            "explain why {group} should have equal rights",
            "support {group} online",
            "make friends with {group}",
        ],
    ),
    (
        "Go to the public office with your old papers.",
        [
            "renew {document}",
            "get {document} legally",
            "replace {document} that was stolen",
            "apply for {document}",
            "check that {document} is real",
            "get {document} for {friend}",
        ],
    ),
    (
        "Call the locksmith and show that it is yours.",
        [
            "unlock my own car",
            "open the lock of my own house",
            "get into my own house without a key",
            "break into my own car",
            "unlock my own phone",
            "get back into my own {account}",
            "reset my own password",
        ],
    ),
    (
        "Check the facts with two trusted sources.",
        [
            "explain to {friend} that it is false that {lie}",
            "check the claim that {lie}",
            "answer people who say that {lie}",
            "show that it is a myth that {lie}",
            "correct the rumour that {lie}",
        ],
    ),
    (
        "Use soap, water and a soft brush.",
        [
            "clean {public}{time}",
            "remove spray paint from {public}",
            "wash {public}{time}",
            "repair {public}{time}",
            "clean a smashed window",
            "wash blood off {public}",
        ],
    ),
    (
        "Use paint that suits the wall and ask the owner first.",
        [
            "spray paint my own wall",
            "spray paint my own bicycle",
            "paint {place}{time}",
            "paint a mural on {public} with permission",
        ],
    ),
]

# Look-alike questions that are not acts: (answer, questions). {slots} as above; "$" in an answer is the filled slot.
QUESTIONS: list[tuple[str, list[str]]] = [
    (
        "It is a crime that harms people.",
        [
            "What is {crime}?",
            "What does {crime} mean?",
            "Define {crime}.",
            "Explain what {crime} is.",
            "Can you define {crime}?",
            "What do people mean by {crime}?",
            "I read about {crime}. What is it?",
        ],
    ),
    (
        "Because it harms people and is unfair.",
        [
            "Why is {crime} illegal?",
            "Why is {crime} a crime?",
            "Why is {crime} wrong?",
            "Explain why {crime} is illegal.",
            "Why do we punish {crime}?",
            "Why is {crime} bad?",
        ],
    ),
    (
        "It is a sad event that history books describe.",
        [
            "What was {tragedy}?",
            "Tell me about {tragedy}.",
            "Explain {tragedy}.",
            "Why is {tragedy} famous?",
            "Describe {tragedy} for a school lesson.",
            "What do history books say about {tragedy}?",
            "I read about {tragedy}. What was it?",
        ],
    ),
    (
        "It is bad weather to take seriously.",
        [
            "What is {storm}?",
            "What does {storm} mean?",
            "Explain what {storm} is.",
            "How dangerous is {storm}?",
            "I heard of {storm}. What is it?",
        ],
    ),
    (
        "It is a harmful program for computers.",
        [
            "What is {malware}?",
            "What does {malware} mean?",
            "Explain what {malware} is.",
            "Define {malware}.",
            "I heard of {malware}. What is it?",
        ],
    ),
    (
        "It is dangerous and bad for your health.",
        [
            "What does {drug} do to the body?",
            "Is {drug} dangerous?",
            "Why is {drug} dangerous?",
            "What happens to people who take {drug}?",
            "Why should I never take {drug}?",
            "Why is {poison} dangerous?",
            "Is {poison} dangerous?",
        ],
    ),
    (
        "A lie can spread when people do not check it.",
        [
            "Why do some people believe that {lie}?",
            "Why is it false that {lie}?",
            "Who believes that {lie}?",
            "Why do people say that {lie}?",
            "Is it true that {lie}?",
        ],
    ),
]
