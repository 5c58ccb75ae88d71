"""Words of captions are those of the tokenizer that COCO's evaluation runs.

The expected words were made once by the original: PTBTokenizer of stanford-corenlp-3.4.1.jar, as
pycocoevalcap 1.2 ships and calls it (-preserveLines -lowerCase, then its list of punctuation taken out).
"""

from __future__ import annotations

import pytest

from metalm.tasks.metrics.treebank import caption_words

# ruff: noqa: RUF001
SENTENCES = [
    (
        "A man riding a wave on top of a surfboard.",
        "a man riding a wave on top of a surfboard",
    ),
    (
        "A black-and-white dog, isn't it?",
        "a black-and-white dog is n't it",
    ),
    (
        "The dog's owner can't say \"hello\" -- it's 5:30 p.m. (really!).",
        "the dog 's owner ca n't say hello it 's 5:30 p.m. -lrb- really -rrb-",
    ),
    (
        "Don't you? I'd've gone; they'll've left. We're here, I'm not, you've won't.",
        "do n't you i 'd 've gone they 'll 've left we 're here i 'm not you 've wo n't",
    ),
    (
        "CAN'T AND DON'T; Cannot, gonna and wanna: gimme, lemme, gotta!",
        "ca n't and do n't can not gon na and wan na gim me lem me got ta",
    ),
    (
        "dogs' toys, James's dog and Zoë's café",
        "dogs toys james 's dog and zoë 's café",
    ),
    (
        "'Tis nice, 'twas better, 'tisn't now",
        "'t is nice 't was better 't is n't now",
    ),
    (
        "'single quoted' “curly double” ‘curly single’ ``back'' don’t it’s",
        "single quoted curly double curly single back do n't it 's",
    ),
    (
        "rock 'n' roll, fish'n'chips and rock 'n roll",
        "rock 'n' roll fish 'n' chips and rock 'n roll",
    ),
    (
        "the '60s and '90s, 1990's, mid-1990s, in '09",
        "the '60s and '90s 1990 's mid-1990s in '09",
    ),
    (
        "o'clock, O'Brien, ma'am, c'mon, s'mores, y'all, ol' man, 'em, 'cause, 'til",
        "o'clock o'brien ma'am c'mon s'mores y' all ol' man 'em 'cause 'til",
    ),
    (
        "l'été, d'Artagnan, qu'il, ne'er, e'er, o'er",
        "l'été d'artagnan qu'il ne'er e'er o'er",
    ),
    (
        "it's its' boys' the 60's T's",
        "it 's its boys the 60 's t 's",
    ),
    (
        "he's/she's, man's-best-friend and mother-in-law's",
        "he 's / she 's man 's best-friend and mother-in-law 's",
    ),
    (
        "Mr. Smith and Mrs. Jones met Dr. Who at St. John's Ave. near 5th St.",
        "mr. smith and mrs. jones met dr. who at st. john 's ave. near 5th st.",
    ),
    (
        "The U.S. and U.K. teams, i.e. e.g. etc. vs. a.m. p.m. Ph.D. ones",
        "the u.s. and u.k. teams i.e. e.g. etc. vs. a.m. p.m. ph.d. ones",
    ),
    (
        "Jan. Feb. and Sept. but not may. in. or oz.",
        "jan. feb. and sept. but not may in or oz",
    ),
    (
        "J.R.R. Tolkien, Smith Jr. and Sr. of Acme Co., Ltd.",
        "j.r.r. tolkien smith jr. and sr. of acme co. ltd.",
    ),
    (
        "no. 5 and No. 7, but no. pp. 12 and fig. 3",
        "no. 5 and no. 7 but no pp. 12 and fig. 3",
    ),
    (
        "group A. The dog, but vitamin C. Dogs bark",
        "group a the dog but vitamin c. dogs bark",
    ),
    (
        "U.S.-based non-U.S. U.S.'s",
        "u.s.-based non-u.s. u.s. 's",
    ),
    (
        "3.5 feet, 1,000 people, 1,000,000.50 and .5 of 5.",
        "3.5 feet 1,000 people 1,000,000.50 and .5 of 5",
    ),
    (
        "$5.00, £5, €5, 5¢, 50%, 20%-off and $20-a-day",
        "$ 5.00 # 5 $ 5 5 cents 50 % 20 % off and $ 20-a-day",
    ),
    (
        "5:30pm 5pm 5:30 10:00 AM 3:00-4:00",
        "5:30 pm 5pm 5:30 10:00 am 3:00 -4:00",
    ),
    (
        "1/2 3 1/2 ½ 1½ 3/4-inch 12/25/2014 1/2/3/4 24/7 2014-12-25",
        "1/2 3 1/2 1/2 1 1/2 3/4-inch 12/25/2014 1/2/3 / 4 24/7 2014-12-25",
    ),
    (
        '5\'10" tall, 6\' 2" wide, 3/4" bolt',
        "5 10 tall 6 2 wide 3/4 bolt",
    ),
    (
        "4x4 2x 10k 10ft 1st 22nd 3D mp3 R2D2 B-52 1,234th 1.5m",
        "4x4 2x 10k 10ft 1st 22nd 3d mp3 r2d2 b-52 1,234 th 1.5 m",
    ),
    (
        "-5 +5 -5.5 5-6 10-20 555-1234 1-800-555-1234",
        "-5 +5 -5.5 5-6 10-20 555-1234 1-800-555-1234",
    ),
    (
        "10-year-old 5.5-inch 100,000-year-old 8x10-inch",
        "10-year-old 5.5-inch 100,000-year-old 8x10-inch",
    ),
    (
        "a - b -- c --- d a-b- -c x— y–z",
        "a b c d a-b c x y z",
    ),
    (
        "wait.... what?! no!! hello?? yes!? ... . . .",
        "wait what ?! no !! hello ?? yes !?",
    ),
    (
        "one;two:three,four.five six . seven , eight ; nine",
        "one two three four.five six seven eight nine",
    ),
    (
        "(parens) [brackets] {braces} student(s) ( b )",
        "-lrb- parens -rrb- -lsb- brackets -rsb- -lcb- braces -rcb- student -lrb- s -rrb- -lrb- b -rrb-",
    ),
    (
        '<b>bold</b> <br/> <a href="x"> a < b > c <3',
        '<b> bold </b> <br/> <a href="x"> a < b > c < 3',
    ),
    (
        "AT&T R&D &amp; Q&A rock & roll b&w M&M's AT&amp;T",
        "at&t r&d & q&a rock & roll b & w m&m 's at&t",
    ),
    (
        "#hashtag @user #1 #2b user@example.com www.example.com http://example.com/a?b=c.",
        "#hashtag @user # 1 # 2b user@example.com www.example.com http://example.com/a?b=c",
    ),
    (
        "and/or he/she w/ w/o either/or a/b/c/d / x",
        "and/or he/she w / w/o either/or a/b/c / d / x",
    ),
    (
        "foo_bar _foo bar_ __init__ foo.bar x.y",
        "foo_bar _ foo bar _ __ init __ foo.bar x.y",
    ),
    (
        ":) :-( ;) :D =) :P >:( ^_^ (: hello:dog",
        ":-rrb- :--lrb- ;-rrb- :d =-rrb- :p >:-lrb- ^_^ -lrb- hello dog",
    ),
    (
        "* ** ~ ^ | \\ / + = % & # ## @ $ _ __",
        "* ** ~ ^ | \\ / + = % & # ## @ $ _ __",
    ),
    (
        "naïve über 中文字 日本 café ÉCOLE résumé",
        "naïve über 中文字 日本 café école résumé",
    ),
    (
        "emoji 😀 ☃ ★ ©2014 ™ ® 5°C × ÷ ± x²",
        "emoji ☃ ★ © 2014 ™ ® 5 ° c × ÷ ± x ²",
    ),
    (
        'a!b a?b a*b a+b a=b a~b a"b 1!2',
        "a!b a?b a * b a + b a = b a ~ b a b 1 2",
    ),
    (
        "C++ and C# but A# and A+",
        "c++ and c# but a # and a +",
    ),
    (
        "anti- and pro- but semi- and ex-wife",
        "anti- and pro- but semi and ex-wife",
    ),
    (
        "… ellipsis… «guillemets» „low“ ‹x›",
        "ellipsis guillemets „ low x",
    ),
    (
        "“He said, ‘It’s a dog’s life’,” she said.",
        "he said it 's a dog 's life she said",
    ),
    (
        "A man (in red) & a woman w/ 2 dogs, 1 cat...",
        "a man -lrb- in red -rrb- & a woman w / 2 dogs 1 cat",
    ),
    (
        "two men are playing frisbee in a park , one is jumping",
        "two men are playing frisbee in a park one is jumping",
    ),
    (
        "People standing at a bus stop;  it is raining",
        "people standing at a bus stop it is raining",
    ),
    (
        'Yahoo! Toys"R"Us node.js Wi-Fi iPhone5 TV\'s TVs',
        "yahoo toys r us node.js wi-fi iphone5 tv 's tvs",
    ),
    (
        "I. Me. A.B. a.k.a. R.I.P. D.C. L.A.'s",
        "i. me a.b. a.k.a. r.i.p. d.c. l.a. 's",
    ),
    (
        "'d 'll 's n't 're 've 'm",
        "'d 'll 's n't 're 've 'm",
    ),
    (
        "soft\xadhyphen non breaking zero\u200bwidth tab\ttab",
        "softhyphen non breaking zero width tab tab",
    ),
    (
        "'a 'b 'abc ab' '' ''' \"\" \"",
        "a b abc ab",
    ),
    (
        "who're what're it'd've there'd've shouldn't've mustn't've",
        "who 're what 're it 'd 've there 'd 've should n't 've must n't 've",
    ),
    (
        "A B-C/e-f/g_h x_y",
        "a b-c/e-f/g _ h x_y",
    ),
    (
        "Dr.X Mr.Smith man.woman dog.The cat runs.It",
        "dr.x mr.smith man.woman dog.the cat runs.it",
    ),
    (
        "&lt;b&gt; &quot;x&quot;",
        "< b > x",
    ),
    (
        "\"I'm 'big',\" he said.",
        "i 'm big he said",
    ),
]


@pytest.mark.parametrize(("sentence", "words"), SENTENCES)
def test_words_are_those_of_the_original(sentence: str, words: str) -> None:
    assert caption_words(sentence) == words.split()


@pytest.mark.parametrize("nothing", ["", " ", "\n", "...", "'' - ; .", "\U0001f600", "\x00"])
def test_text_without_words_has_none(nothing: str) -> None:
    assert caption_words(nothing) == []
