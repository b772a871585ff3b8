"""What people do to any question: general frames, shortcuts, greetings, and other names for what they ask about."""

from collections.abc import Mapping

from services.demo.facts import Kind

# Frames that ask for any fact that has a name of its own.
FRAMES = (
    "What is the {p} of {n}?",
    "What's the {p} of {n}?",
    "What is {n}'s {p}?",
    "What's {n}'s {p}?",
    "Tell me the {p} of {n}.",
    "Tell me {n}'s {p}.",
    "Give me the {p} of {n}.",
    "Do you know the {p} of {n}?",
    "{n} {p}",
    "{p} {n}",
    "{p} of {n}",
    "I need the {p} of {n}.",
    "Which {p} does {n} have?",
    "What {p} does {n} have?",
    "Show the {p} for {n}",
    "Find the {p} of {n}.",
    "Could you tell me the {p} of {n}?",
    "{n}: {p}?",
    "Please give the {p} of {n}.",
    "What would be the {p} of {n}?",
    "And the {p} of {n}?",
    "Name the {p} of {n}.",
    "What {p} is there for {n}?",
    "What is the {p} for {n}?",
    "For {n}, what is the {p}?",
    "The {p} of {n} is what?",
    "Look up the {p} of {n}.",
    "What do you know about the {p} of {n}?",
)
STOP_WORDS = frozenset(
    ("the", "is", "of", "a", "an", "in", "what", "which", "does", "do", "are", "that", "there", "to", "on", "at")
)
POLITE = ("Please tell me: ", "I want to know: ", "Hi, ", "Can you tell me: ", "Hello, ", "Quick question: ", "So, ")

NOUNS: Mapping[Kind, str] = {"city": "the city of {n}", "country": "the country {n}", "element": "the element {n}"}

# Other names that people use. Nobody can guess these, so only entities of the training split are asked about by them.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "Aluminum": ("aluminium",),
    "Bengaluru": ("Bangalore",),
    "Cabo Verde": ("Cape Verde",),
    "Cesium": ("caesium",),
    "Chattogram": ("Chittagong",),
    "Czechia": ("Czech Republic",),
    "Democratic Republic of the Congo": ("DR Congo",),
    "Gent": ("Ghent",),
    "Ho Chi Minh City": ("Saigon", "HCMC"),
    "Ivory Coast": ("Côte d'Ivoire",),
    "Kolkata": ("Calcutta",),
    "Kyiv": ("Kiev",),
    "Köln": ("Cologne",),
    "Makkah": ("Mecca",),
    "Mexico City": ("CDMX", "Ciudad de México"),
    "Mumbai": ("Bombay",),
    "Netherlands": ("Holland",),
    "New York City": ("New York", "NYC"),
    "Sulfur": ("sulphur",),
    "Turkey": ("Türkiye",),
    "United Arab Emirates": ("UAE",),
    "United Kingdom": ("UK", "Great Britain"),
    "Washington": ("Washington, D.C.", "Washington DC"),
    "Yangon": ("Rangoon",),
    "United States": ("USA", "US", "United States of America", "America"),
}
