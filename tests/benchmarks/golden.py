"""Hand-written answers and what each rule makes of them, derived by hand from the rules' definitions."""

YES_NO = ("POPE official", "POPE lmms-eval", "MME official", "MME lmms-eval", "POPE vlmevalkit", "POPE strict")
Y, N = "yes", "no"
YES_NO_ANSWERS = {
    #                                        POPE  POPE  MME   MME   VLM-
    #                                        off.  lmms  off.  lmms  Eval  strict
    "Yes":                                   (Y,    Y,    Y,    Y,    Y,    Y),
    "yes.":                                  (Y,    None, Y,    Y,    Y,    Y),
    "Yes, there is a dog":                   (Y,    None, Y,    Y,    Y,    Y),
    "There is no dog":                       (N,    None, None, None, N,    None),
    "No.":                                   (N,    None, N,    N,    N,    N),
    "NO":                                    (Y,    N,    N,    N,    N,    N),      # POPE knows No and no
    "No\nThe image shows a cat":             (Y,    None, N,    N,    N,    N),      # POPE splits at spaces only
    "Not at all":                            (Y,    None, N,    N,    None, None),   # POPE knows not, but not Not
    "No, it is not. Yes, a cat":             (N,    None, N,    N,    None, N),
    "I see a cat. There is no dog":          (Y,    None, None, None, N,    None),   # POPE reads one sentence
    "y":                                     (Y,    None, None, Y,    None, None),
    "Known objects: a dog":                  (Y,    None, N,    N,    None, None),   # kNOwn
    "maybe":                                 (Y,    None, None, None, None, None),
    "(B) because":                           (Y,    None, None, None, None, None),
    "":                                      (Y,    None, None, None, None, None),
    "Oui, il y a un chien":                  (Y,    None, None, None, None, None),
    "Non, il n'y a pas de chien":            (Y,    None, N,    N,    None, None),   # NOn
    "Nein":                                  (Y,    None, None, None, None, None),
    "没有":                                   (Y,    None, None, None, None, None),
}
CHOICE = ("MMStar official", "MMStar lmms-eval", "MMStar vlmevalkit", "MMStar strict")
CHOICE_ANSWERS = {
    #                                        off.  lmms  VLM   strict
    "B":                                     ("B",  "B",  "B",  "B"),
    "B.":                                    ("B",  "B",  "B",  "B"),
    "(B) because":                           ("B",  "B",  "B",  "B"),
    "D: 4":                                  ("D",  "D",  "D",  "D"),
    "b":                                     ("B",  None, None, None),
    "Option D":                              ("D",  "D",  "D",  None),
    "The answer is C":                       ("C",  "C",  "C",  None),
    "The answer is a dog":                   ("A",  None, "A",  None),
    "A dog":                                 ("A",  "A",  "A",  "A"),   # an article for a letter
    "Because it is blue":                    ("B",  "B",  None, None),  # the B of Because
    "Cats":                                  ("C",  "C",  None, None),
    "A or B":                                ("A",  "A",  None, "A"),
    "I think it is C since the sky is blue": (None, "C",  None, None),  # VLMEvalKit: not among the last four words
    "We see a cat, so it must be (A)":       (None, "A",  "A",  None),
    "maybe":                                 (None, None, None, None),
    "":                                      (None, None, None, None),
    "Die Antwort ist A":                     ("D",  "A",  "A",  None),  # the D of Die
    "答案是B":                                (None, "B",  None, None),
}


def table(rules: tuple[str, ...], answers: dict[str, tuple]) -> str:
    """A Markdown table: a row a text, a column a rule; a dash where the rule finds no answer."""
    shown = {text: "`" + text.replace("\n", "⏎") + "`" if text else "(empty)" for text in answers}
    rows = [["the model says", *rules], ["---"] * (len(rules) + 1)]
    rows += [[shown[text], *(found or "–" for found in expected)] for text, expected in answers.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
