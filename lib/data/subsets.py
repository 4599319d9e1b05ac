"""Named subsets of ImageNet-1K: which classes they hold, and in which order these become labels.

``CLASSES`` has one line per class that some subset uses: synset, position in the alphabetical list of the 1000
synsets (the output of a classifier trained on all of ImageNet-1K) and name. ``SUBSETS`` lists synsets; **their order
is the label order** of the projects that use them, which is not the alphabetical one.

Sources: the six themed sets after the MTT code (papers also say ImageNet-Fruits, -Cats, -Birds for imagefruit,
imagemeow, imagesquawk); imagenet-a to -e and the geo, food, mammals and marine sets after GLaD; imageidc and
imagenet100 after IDC and Minimax (imageidc is the first ten of imagenet100).

Not to be confused with: the robustness sets ImageNet-A and ImageNet-C, which only share the letter; fast.ai's archives
of ImageNette and ImageWoof, whose split into training and test images differs from the one papers of this field use.
"""

from __future__ import annotations

_CLASSES = """
n01440764 0 tench
n01484850 2 great white shark
n01518878 9 ostrich
n01531178 11 goldfinch
n01534433 13 junco
n01558993 15 robin
n01592084 19 chickadee
n01614925 22 bald eagle
n01622779 24 great grey owl
n01664065 33 loggerhead
n01692333 45 Gila monster
n01729322 54 hognose snake
n01735189 57 garter snake
n01749939 64 green mamba
n01773157 72 black and gold garden spider
n01773797 74 garden spider
n01774750 76 tarantula
n01806143 84 peacock
n01818515 88 macaw
n01819313 89 sulphur-crested cockatoo
n01820546 90 lorikeet
n01828970 92 bee eater
n01829413 93 hornbill
n01833805 94 hummingbird
n01843383 96 toucan
n01855672 99 goose
n01860187 100 black swan
n01872401 102 echidna
n01873310 103 platypus
n01877812 104 wallaby
n01910747 107 jellyfish
n01914609 108 sea anemone
n01978455 119 rock crab
n01980166 120 fiddler crab
n01983481 122 American lobster
n02006656 129 spoonbill
n02007558 130 flamingo
n02009229 131 little blue heron
n02013706 135 limpkin
n02017213 136 European gallinule
n02018207 137 American coot
n02025239 139 ruddy turnstone
n02051845 144 pelican
n02056570 145 king penguin
n02071294 148 killer whale
n02077923 150 sea lion
n02085620 151 Chihuahua
n02086240 155 Shih-Tzu
n02086910 157 papillon
n02087046 158 toy terrier
n02087394 159 Rhodesian ridgeback
n02088364 162 beagle
n02089867 166 Walker hound
n02089973 167 English foxhound
n02090622 169 borzoi
n02091831 176 Saluki
n02093428 180 American Staffordshire terrier
n02093754 182 Border terrier
n02096294 193 Australian terrier
n02099601 207 golden retriever
n02099849 209 Chesapeake Bay retriever
n02100583 211 vizsla
n02102040 217 English springer
n02104029 222 kuvasz
n02105505 228 komondor
n02105641 229 Old English sheepdog
n02106550 234 Rottweiler
n02107142 236 Doberman
n02108089 242 boxer
n02109047 246 Great Dane
n02111129 255 Leonberg
n02111889 258 Samoyed
n02112018 259 Pomeranian
n02112706 262 Brabancon griffon
n02113799 267 standard poodle
n02113978 268 Mexican hairless
n02114855 272 coyote
n02115641 273 dingo
n02116738 275 African hunting dog
n02119022 277 red fox
n02120079 279 Arctic fox
n02123045 281 tabby
n02123159 282 tiger cat
n02123394 283 Persian cat
n02123597 284 Siamese cat
n02124075 285 Egyptian cat
n02127052 287 lynx
n02128757 289 snow leopard
n02128925 290 jaguar
n02129165 291 lion
n02129604 292 tiger
n02138441 299 meerkat
n02172182 305 dung beetle
n02206856 309 bee
n02231487 313 walking stick
n02259212 317 leafhopper
n02276258 321 admiral
n02277742 322 ringlet
n02280649 324 cabbage butterfly
n02281787 326 lycaenid
n02317335 327 starfish
n02326432 331 hare
n02342885 333 hamster
n02346627 334 porcupine
n02364673 338 guinea pig
n02389026 339 sorrel
n02391049 340 zebra
n02396427 342 wild boar
n02437312 354 Arabian camel
n02457408 364 three-toed sloth
n02480855 366 gorilla
n02483362 368 gibbon
n02488291 374 langur
n02489166 376 proboscis monkey
n02504458 386 African elephant
n02509815 387 lesser panda
n02606052 392 rock beauty
n02655020 397 puffer
n02701002 407 ambulance
n02788148 421 bannister
n02804414 431 bassinet
n02859443 449 boathouse
n02869837 452 bonnet
n02877765 455 bottlecap
n02974003 479 car wheel
n02979186 482 cassette player
n03000684 491 chain saw
n03017168 494 chime
n03028079 497 church
n03032252 498 cinema
n03042490 500 cliff dwelling
n03062245 503 cocktail shaker
n03085013 508 computer keyboard
n03208938 535 disk brake
n03259280 544 Dutch oven
n03344393 554 fireboat
n03379051 560 football helmet
n03393912 565 freight car
n03394916 566 French horn
n03417042 569 garbage truck
n03424325 570 gasmask
n03425413 571 gas pump
n03445777 574 golf ball
n03447447 576 gondola
n03492542 592 hard disc
n03494278 593 harmonica
n03530642 599 honeycomb
n03584829 606 iron
n03594734 608 jean
n03637318 619 lampshade
n03642806 620 laptop
n03764736 653 milk can
n03775546 659 mixing bowl
n03777754 662 modem
n03785016 665 moped
n03787032 667 mortarboard
n03794056 674 mousetrap
n03837869 682 obelisk
n03841143 685 odometer
n03857828 688 oscilloscope
n03888257 701 parachute
n03891251 703 park bench
n03903868 708 pedestal
n03924679 713 photocopier
n03930630 717 pickup
n03947888 724 pirate
n03992509 739 potter's wheel
n04026417 748 purse
n04067472 758 reel
n04099969 765 rocking chair
n04111531 766 rotisserie
n04127249 772 safety pin
n04136333 775 sarong
n04146614 779 school bus
n04153751 783 screw
n04229816 796 ski mask
n04238763 798 slide rule
n04277352 816 spindle
n04336792 830 stretcher
n04418357 854 theater curtain
n04429376 857 throne
n04435653 858 tile roof
n04485082 872 tripod
n04487081 874 trolleybus
n04493381 876 tub
n04517823 882 vacuum
n04589890 904 window screen
n04592741 908 wing
n06359193 916 web site
n07583066 924 guacamole
n07613480 927 trifle
n07614500 928 ice cream
n07684084 930 French loaf
n07693725 931 bagel
n07695742 932 pretzel
n07697313 933 cheeseburger
n07697537 934 hotdog
n07714571 936 head cabbage
n07715103 938 cauliflower
n07718472 943 cucumber
n07720875 945 bell pepper
n07742313 948 Granny Smith
n07745940 949 strawberry
n07747607 950 orange
n07749582 951 lemon
n07753113 952 fig
n07753275 953 pineapple
n07753592 954 banana
n07768694 957 pomegranate
n07831146 959 carbonara
n07836838 960 chocolate sauce
n07873807 963 pizza
n09193705 970 alp
n09246464 972 cliff
n09256479 973 coral reef
n09288635 974 geyser
n09332890 975 lakeside
n09399592 976 promontory
n09421951 977 sandbar
n09428293 978 seashore
n09468604 979 valley
n09472597 980 volcano
n11879895 984 rapeseed
n12057211 986 yellow lady's slipper
n12144580 987 corn
n13037406 993 gyromitra
n13040303 994 stinkhorn
n13044778 995 earthstar
"""

# synset -> (position in ImageNet-1K, name)
CLASSES: dict[str, tuple[int, str]] = {
    synset: (int(position), name)
    for synset, position, name in (line.split(" ", 2) for line in _CLASSES.strip().splitlines())
}

SUBSETS: dict[str, tuple[str, ...]] = {
    name: tuple(synsets.split())
    for name, synsets in {
        "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079"
        " n03394916 n03417042 n03425413 n03445777 n03888257",
        "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240"
        " n02089973 n02087394 n02115641 n02099601 n02105641",
        "imagefruit": "n07753275 n07753592 n07745940 n07747607 n07749582"
        " n07768694 n07753113 n07720875 n07718472 n07742313",
        "imagemeow": "n02123045 n02123159 n02123394 n02123597 n02124075"
        " n02129165 n02129604 n02128925 n02128757 n02127052",
        "imagesquawk": "n01806143 n02007558 n01818515 n02051845 n02056570"
        " n01614925 n01843383 n01518878 n01860187 n01819313",
        "imageyellow": "n02206856 n12057211 n07753592 n07749582 n12144580"
        " n04146614 n03530642 n02129165 n01773157 n01531178",
        "imagenet-a": "n02111129 n02489166 n11879895 n02457408 n03042490"
        " n12057211 n02342885 n03447447 n02071294 n02013706",
        "imagenet-b": "n02006656 n06359193 n01820546 n02116738 n13044778"
        " n04487081 n01872401 n02112018 n03841143 n02025239",
        "imagenet-c": "n03393912 n01833805 n03344393 n03208938 n01828970"
        " n02606052 n02129165 n02017213 n02280649 n01531178",
        "imagenet-d": "n01518878 n02111889 n01534433 n02112706 n01592084"
        " n02389026 n02276258 n01622779 n01829413 n02277742",
        "imagenet-e": "n04277352 n01843383 n01860187 n02056570 n03992509"
        " n03924679 n04153751 n01774750 n03857828 n02281787",
        "imageidc": "n02869837 n01749939 n02488291 n02107142 n13037406"
        " n02091831 n04517823 n04589890 n03062245 n01773797",
        "imagenet-geo": "n09472597 n09193705 n09332890 n09288635 n09256479"
        " n09421951 n09399592 n09428293 n09246464 n09468604",
        "imagenet-food": "n07697313 n07697537 n07695742 n07873807 n07684084"
        " n07614500 n07583066 n07831146 n07693725 n07613480",
        "imagenet-mammals": "n02504458 n02509815 n02437312 n02391049 n02364673"
        " n01877812 n01873310 n02120079 n02346627 n02480855",
        "imagenet-marine": "n02071294 n01484850 n02655020 n02317335 n01664065"
        " n02077923 n01910747 n01914609 n01978455 n02606052",
        "imagenet100": """
            n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890
            n03062245 n01773797 n01735189 n07831146 n07753275 n03085013 n04485082 n02105505
            n01983481 n02788148 n03530642 n04435653 n02086910 n02859443 n13040303 n03594734
            n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 n02877765 n04429376
            n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
            n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251
            n02701002 n03379051 n02259212 n07715103 n03947888 n04026417 n02326432 n03637318
            n01980166 n02113799 n02086240 n03903868 n02483362 n04127249 n02089973 n03017168
            n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 n02113978 n03787032
            n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
            n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630
            n03584829 n02123045 n04229816 n02100583 n03642806 n04336792 n03259280 n02116738
            n02108089 n03424325 n01855672 n02090622
        """,
    }.items()
}


def class_names(name: str) -> tuple[str, ...]:
    """The class names of a subset in label order."""
    return tuple(CLASSES[synset][1] for synset in SUBSETS[name])


def positions(name: str) -> tuple[int, ...]:
    """For each label of a subset the output of an ImageNet-1K classifier that stands for the same class."""
    return tuple(CLASSES[synset][0] for synset in SUBSETS[name])
