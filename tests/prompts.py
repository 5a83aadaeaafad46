"""Texts for the tokenizers: prompts in many scripts, hard ones, and seeded random strings."""

import random
import unicodedata

PLAIN = [
    "A photo of an astronaut riding a horse on Mars.",
    "a red apple on a blue background",
    "Two cats, one black and one white; 3 dogs & 12 birds!",
    "it's a fox that doesn't know we're here, they've said I'm late, you'll see, he'd go",
    "IT'S A FOX. THEY'LL SEE, WE'RE HERE",
    "“Curly quotes” and ‘single ones’ — it’s a dash… and an ellipsis",
    "f/1.8, 85mm, ISO 200, 1/250s, $3.50 (50% off) #photo @home http://example.com/a?b=c&d=1",
    "masterpiece, (best quality:1.2), [[detailed]], 8k, <lora:style:0.8>, BREAK, sks dog",
    "1234567890 3.14159 1,000,000 ½ ⅔ ² ³ ① Ⅷ ٣٤٥ १२३",
    "snake_case camelCase kebab-case under__score x=y+z*2^3~`|\\",
    "café naïve résumé Ångström façade coöperate Übergröße straße œuvre",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío, añoraba a su querido cachorro.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Zażółć gęślą jaźń",
    "Tiếng Việt: một con mèo ngồi trên bàn cỏ xanh, phở bò đặc biệt",
    "İstanbul'da ılık bir akşam, DİYARBAKIR IŞIK",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "ΟΔΥΣΣΕΥΣ και ο σκύλος του Άργος",
    "צילום של חתול יושב על החלון עִבְרִית",
    "صورة لرائد فضاء يركب حصانًا على المريخ",
    "मंगल ग्रह पर घोड़े की सवारी करता अंतरिक्ष यात्री",
    "ภาพถ่ายของแมวนั่งอยู่ริมหน้าต่าง",
    "火星上骑马的宇航员照片,高清。",
    "火星で馬に乗る宇宙飛行士の写真、ガギグゲゴ ﾊﾝｶｸ",
    "화성에서 말을 타는 우주비행사의 사진",
    "ვეფხისტყაოსანი ამბავი",
    "Հայերեն տեքստ",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ ᎠᏂᏴᏫᏯᎢ ᚠᚢᚦᚨᚱᚲ",
    "😀😃😄 a smiling face 🍎🍏 🚀",
    "family 👨‍👩‍👧‍👦 and flags 🇩🇪🇯🇵 and skin 👍🏽 and heart ❤️‍🔥 keycap 1️⃣",
    "Ｆｕｌｌｗｉｄｔｈ ｔｅｘｔ ﬁ ﬂ ﬃ ™ ℃ № ㎏ ㍿ ﷺ",
    "𝐁𝐨𝐥𝐝 𝒮𝒸𝓇𝒾𝓅𝓉 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝕕𝕠𝕦𝕓𝕝𝕖",
    "z̸̡̛a̵l̶g̷o̴ t̸e̵x̶t̷",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β) → ∫∮ √2 ≈ 1.414",
    "▁ meta▁symbol ▁▁ and _ too",
    "C:\\path\\to\\file.txt; rm -rf ~ && echo $HOME",
    "<html><b>bold</b> &amp; &lt;</html> &nbsp; {\"json\": [1, 2]}",
]  # fmt: skip

HARD = [
    "",
    " ",
    "     ",
    "\n\n\t\r\n",
    "\u3000\u00a0\u2003",
    " leading and trailing   ",
    "tabs\tand\nnew\r\nlines\x0band\x0cmore\x85here\u2028there\u2029end",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom soft\u00adhyphen",
    "control\x00\x01\x02\x07\x08\x1b[31mred\x1b[0m\x7f\x80\x9f characters",
    "left\u202eright\u202c marks\u200e\u200f",
    "replacement \ufffd private \ue000 noncharacter \uffff",
    "<|endoftext|>",
    "a cat <|endoftext|> a dog",
    "<|startoftext|>a cat<|endoftext|><|endoftext|>",
    "<|EndOfText|> !<|ENDOFTEXT|>! <| endoftext |> <|endoftext| >",
    "a </s> b<pad>c <unk> d </S> < /s>",
    "<extra_id_0><extra_id_99> <extra_id_100> <extra_id_07> x<extra_id_1>y",
    "＜／ｓ＞ ＜pad＞",
    "'s 't 're 've 'm 'll 'd ''s !'s 's's x's's",
    "....!!!???---'''\"\"\"",
    "a" * 400,
    "ab" * 300,
    "é" * 100,
    "漢字" * 150,
    "👨‍👩‍👧‍👦" * 60,
    "Pneumonoultramicroscopicsilicovolcanoconiosis supercalifragilisticexpialidocious",
    "word " * 700,
    "A photo of a very long road, with many small stones beside it, " * 60,
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 12,
]


def prompts() -> list[str]:
    """Some 300 texts: the plain ones as they are, in capitals, composed, decomposed, and joined to others."""
    texts = [*PLAIN, *HARD]
    for i, text in enumerate(PLAIN):
        other = PLAIN[(i * 7 + 3) % len(PLAIN)]
        texts += [text.upper(), text.title(), f"  {text}\n{other}", f"{text}{other[::-1]}"]
        texts += [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKD")]
    return texts


def characters(first: int, last: int, keep=lambda letter: True) -> list[str]:
    """The assigned characters of a range that stand alone; accents come from the lists of accents below."""
    letters = [chr(code) for code in range(first, last + 1)]
    unassigned = ("Cn", "Cs", "Co")
    return [
        letter
        for letter in letters
        if unicodedata.category(letter) not in unassigned
        and not unicodedata.combining(letter)
        and keep(letter)
    ]


ACCENTS = [chr(code) for code in (*range(0x300, 0x370), 0x5B4, 0x5BC, 0x64E, 0x651, 0x93C, 0x3099, 0x309A)]
LATIN_ACCENTS = [
    chr(code) for code in (0x300, 0x301, 0x302, 0x303, 0x306, 0x308, 0x309, 0x31B, 0x323, 0x327, 0x328)
]
SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "</s>", "<pad>", "<unk>", "<extra_id_0>"]

ALPHABETS = {
    "everything": characters(0, 0x1FFFF),
    "latin": characters(0, 0x24F),
    "controls": characters(0, 0x9F),
    "ascii": list("abcdefghijklmnopqrstuvwxyz      ,.!'-0123\t\n\r"),
    "capitals": characters(0, 0x1FFFF, lambda letter: letter.lower() != letter) + list("ΣσςİIı ab"),
    "vietnamese": [*"aeiouyAEIOUYdn ", *LATIN_ACCENTS],
    "accents": [*"aeiou kst", *ACCENTS],
    "ligatures": characters(0xA0, 0xFFFF, lambda letter: unicodedata.normalize("NFKC", letter) != letter)
    + LATIN_ACCENTS * 30,
    "semitic and indic": characters(0x590, 0x10FF),
    "east asian": characters(0x2E80, 0xABFF),
    "hangul": [chr(code) for code in (*range(0x1100, 0x1200), *range(0xAC00, 0xAD00))],
    "emoji": characters(0x1F000, 0x1FAFF) + ["\u200d", "\ufe0f", "\U0001f3fb", "\u20e3"] * 30,
    "spaces": list("▁ ab\u00a0\u3000\u200b\u2028\u2029\t\n\r\x0b\x0c\x1c\x1f\x85\ufeff\u180e\u1680"),
    "contractions": ["'s", "'t", "'re", "'ve", "'ll", "'S", "’s", " ", "I", "he", "'", "!", "1", "é"],
    "special tokens": [*SPECIAL, " ", "  ", "a", "b's", "<", ">", "|", "/", "s", "!"],
}  # fmt: skip


def random_texts(alphabet: str, count: int, seed: int = 0) -> list[str]:
    """`count` strings of 1 to 30 of an alphabet's members, the same for the same seed."""
    rng = random.Random(f"{alphabet} {seed}")
    return ["".join(rng.choices(ALPHABETS[alphabet], k=rng.randint(1, 30))) for _ in range(count)]
