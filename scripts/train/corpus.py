"""The text the embedded model learns from: facts about countries, in varied sentences, and a little plain prose.

One row of COUNTRIES is one country: its English name and its other names, its capital and what else may be accepted as
its capital, where it lies, what people speak and pay with, its sea (`-` none, `~` an island country), some neighbours,
and where the capital lies. An empty field is a fact that is left unsaid. The members of the United Nations come first.
Everything here was written for this project; nothing is copied from a data set.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COUNTRIES = """\
Afghanistan|Kabul|Central Asia|Dari and Pashto|afghani|-|Pakistan, Iran|on the river Kabul
Albania|Tirana|Southern Europe|Albanian|lek|the Adriatic Sea|Greece, Montenegro|
Algeria|Algiers|North Africa|Arabic and Berber|dinar|the Mediterranean Sea|Morocco, Tunisia|on the Mediterranean coast
Andorra|Andorra la Vella|Southern Europe|Catalan|euro|-|France, Spain|in the Pyrenees
Angola|Luanda|Southern Africa|Portuguese|kwanza|the Atlantic Ocean|Namibia, Zambia|on the Atlantic coast
Antigua and Barbuda;Antigua & Barbuda|St. John's;Saint John's|the Caribbean|English|East Caribbean dollar\
|~the Caribbean Sea||on the island of Antigua
Argentina|Buenos Aires|South America|Spanish|peso|the Atlantic Ocean|Chile, Uruguay|on the Río de la Plata
Armenia|Yerevan|Western Asia|Armenian|dram|-|Georgia, Iran|on the river Hrazdan
Australia|Canberra|Oceania|English|Australian dollar|the Pacific Ocean||between Sydney and Melbourne
Austria|Vienna|Central Europe|German|euro|-|Germany, Italy|on the river Danube
Azerbaijan|Baku|Western Asia|Azerbaijani|manat|the Caspian Sea|Georgia, Iran|on the Caspian Sea
the Bahamas;Bahamas;The Bahamas|Nassau|the Caribbean|English|Bahamian dollar|~the Atlantic Ocean|\
|on the island of New Providence
Bahrain|Manama|Western Asia|Arabic|dinar|~the Persian Gulf||on the island of Bahrain
Bangladesh|Dhaka|South Asia|Bengali|taka|the Bay of Bengal|India, Myanmar|on the river Buriganga
Barbados|Bridgetown|the Caribbean|English|Barbadian dollar|~the Atlantic Ocean||on Carlisle Bay
Belarus|Minsk|Eastern Europe|Belarusian and Russian|rouble|-|Poland, Lithuania|on the river Svislach
Belgium|Brussels|Western Europe|Dutch, French and German|euro|the North Sea|France, the Netherlands\
|in the middle of the country
Belize|Belmopan|Central America|English|Belize dollar|the Caribbean Sea|Mexico, Guatemala|
Benin|Porto-Novo;Cotonou|West Africa|French|West African CFA franc|the Gulf of Guinea|Togo, Nigeria|
Bhutan|Thimphu|South Asia|Dzongkha|ngultrum|-|India, China|in the Himalayas
Bolivia|Sucre;La Paz|South America|Spanish, Quechua and Aymara|boliviano|-|Peru, Brazil|in the Andes
Bosnia and Herzegovina;Bosnia;Bosnia & Herzegovina|Sarajevo|Southern Europe|Bosnian, Croatian and Serbian\
|convertible mark|the Adriatic Sea|Croatia, Serbia|on the river Miljacka
Botswana|Gaborone|Southern Africa|English and Tswana|pula|-|Namibia, Zimbabwe|
Brazil|Brasília;Brasilia|South America|Portuguese|real|the Atlantic Ocean|Peru, Argentina|
Brunei;Brunei Darussalam|Bandar Seri Begawan|Southeast Asia|Malay|Brunei dollar|the South China Sea|Malaysia\
|on the island of Borneo
Bulgaria|Sofia|Eastern Europe|Bulgarian||the Black Sea|Greece, Romania|near the mountain Vitosha
Burkina Faso|Ouagadougou|West Africa|French and Mooré|West African CFA franc|-|Mali, Ghana|
Burundi|Gitega;Bujumbura|East Africa|Kirundi and French|Burundian franc|-|Rwanda, Tanzania|
Cambodia|Phnom Penh|Southeast Asia|Khmer|riel|the Gulf of Thailand|Thailand, Vietnam|on the river Mekong
Cameroon|Yaoundé;Yaounde|Central Africa|French and English|Central African CFA franc|the Gulf of Guinea|Nigeria, Chad|
Canada|Ottawa|North America|English and French|Canadian dollar|the Atlantic Ocean|the United States|on the river Ottawa
Cape Verde;Cabo Verde|Praia|West Africa|Portuguese|escudo|~the Atlantic Ocean||on the island of Santiago
the Central African Republic;Central African Republic|Bangui|Central Africa|Sango and French\
|Central African CFA franc|-|Chad, Cameroon|on the river Ubangi
Chad|N'Djamena;Ndjamena|Central Africa|Arabic and French|Central African CFA franc|-|Niger, Libya|on the river Chari
Chile|Santiago|South America|Spanish|peso|the Pacific Ocean|Argentina, Peru|on the river Mapocho
China;the People's Republic of China|Beijing|East Asia|Chinese|yuan|the Pacific Ocean|Mongolia, Vietnam\
|in the north of the country
Colombia|Bogotá;Bogota|South America|Spanish|peso|the Caribbean Sea|Ecuador, Peru|in the Andes
the Comoros;Comoros|Moroni|East Africa|Comorian, Arabic and French|Comorian franc|~the Indian Ocean|\
|on the island of Grande Comore
the Republic of the Congo;the Congo;Congo;Congo-Brazzaville|Brazzaville|Central Africa|French, Lingala and Kituba\
|Central African CFA franc|the Atlantic Ocean|Gabon, Cameroon|on the river Congo
Costa Rica|San José;San Jose|Central America|Spanish|colón|the Pacific Ocean|Panama, Nicaragua|in the Central Valley
Côte d'Ivoire;Ivory Coast;the Ivory Coast|Yamoussoukro;Abidjan|West Africa|French|West African CFA franc\
|the Gulf of Guinea|Ghana, Mali|in the middle of the country
Croatia|Zagreb|Southern Europe|Croatian|euro|the Adriatic Sea|Slovenia, Hungary|on the river Sava
Cuba|Havana|the Caribbean|Spanish|peso|~the Caribbean Sea||on the north coast of the island
Cyprus|Nicosia|Western Asia|Greek and Turkish|euro|~the Mediterranean Sea||in the middle of the island
the Czech Republic;Czechia;Czech Republic|Prague|Central Europe|Czech|Czech koruna|-|Germany, Poland\
|on the river Vltava
North Korea;the Democratic People's Republic of Korea;DPRK|Pyongyang|East Asia|Korean|won|the Sea of Japan\
|China, South Korea|on the river Taedong
the Democratic Republic of the Congo;Democratic Republic of the Congo;DR Congo;the DRC;Congo-Kinshasa|Kinshasa\
|Central Africa|French, Lingala and Swahili|Congolese franc|the Atlantic Ocean|Angola, Zambia|on the river Congo
Denmark|Copenhagen|Northern Europe|Danish|Danish krone|the North Sea|Germany|on the island of Zealand
Djibouti|Djibouti;Djibouti City|East Africa|French and Arabic|Djibouti franc|the Gulf of Aden|Ethiopia, Somalia\
|on the Gulf of Tadjoura
Dominica|Roseau|the Caribbean|English|East Caribbean dollar|~the Caribbean Sea||on the west coast of the island
the Dominican Republic;Dominican Republic|Santo Domingo|the Caribbean|Spanish|peso|the Caribbean Sea|Haiti\
|on the island of Hispaniola
Ecuador|Quito|South America|Spanish|United States dollar|the Pacific Ocean|Colombia, Peru|in the Andes
Egypt|Cairo|North Africa|Arabic|Egyptian pound|the Mediterranean Sea|Libya, Sudan|on the river Nile
El Salvador|San Salvador|Central America|Spanish|United States dollar|the Pacific Ocean|Guatemala, Honduras|
Equatorial Guinea|Malabo;Ciudad de la Paz|Central Africa|Spanish|Central African CFA franc|the Gulf of Guinea\
|Gabon, Cameroon|on the island of Bioko
Eritrea|Asmara|East Africa|Tigrinya and Arabic|nakfa|the Red Sea|Ethiopia, Sudan|in the highlands
Estonia|Tallinn|Northern Europe|Estonian|euro|the Baltic Sea|Latvia, Russia|on the Gulf of Finland
Eswatini;Swaziland|Mbabane;Lobamba|Southern Africa|Swazi and English|lilangeni|-|South Africa, Mozambique|
Ethiopia|Addis Ababa|East Africa|Amharic and Oromo|birr|-|Kenya, Somalia|in the highlands
Fiji|Suva|Oceania|English, Fijian and Hindi|Fijian dollar|~the Pacific Ocean||on the island of Viti Levu
Finland|Helsinki|Northern Europe|Finnish and Swedish|euro|the Baltic Sea|Sweden, Norway|on the Gulf of Finland
France|Paris|Western Europe|French|euro|the Atlantic Ocean|Spain, Germany|on the river Seine
Gabon|Libreville|Central Africa|French|Central African CFA franc|the Atlantic Ocean|Cameroon|on the river Komo
the Gambia;Gambia;The Gambia|Banjul|West Africa|English|dalasi|the Atlantic Ocean|Senegal|on the river Gambia
Georgia|Tbilisi|Western Asia|Georgian|lari|the Black Sea|Armenia, Turkey|on the river Kura
Germany|Berlin|Central Europe|German|euro|the North Sea|Poland, France|on the river Spree
Ghana|Accra|West Africa|English|cedi|the Gulf of Guinea|Togo, Burkina Faso|on the Atlantic coast
Greece|Athens|Southern Europe|Greek|euro|the Mediterranean Sea|Albania, Bulgaria|near the sea
Grenada|St. George's;Saint George's|the Caribbean|English|East Caribbean dollar|~the Caribbean Sea|\
|on the west coast of the island
Guatemala|Guatemala City|Central America|Spanish|quetzal|the Pacific Ocean|Mexico, Belize|in the highlands
Guinea|Conakry|West Africa|French|Guinean franc|the Atlantic Ocean|Senegal, Mali|on the Atlantic coast
Guinea-Bissau|Bissau|West Africa|Portuguese|West African CFA franc|the Atlantic Ocean|Senegal, Guinea\
|on the Atlantic coast
Guyana|Georgetown|South America|English|Guyanese dollar|the Atlantic Ocean|Suriname, Brazil|on the river Demerara
Haiti|Port-au-Prince|the Caribbean|Haitian Creole and French|gourde|the Caribbean Sea|the Dominican Republic\
|on the island of Hispaniola
Honduras|Tegucigalpa|Central America|Spanish|lempira|the Caribbean Sea|Guatemala, Nicaragua|in the highlands
Hungary|Budapest|Central Europe|Hungarian|forint|-|Austria, Romania|on the river Danube
Iceland|Reykjavík;Reykjavik|Northern Europe|Icelandic|Icelandic króna|~the Atlantic Ocean|\
|in the southwest of the country
India|New Delhi;Delhi|South Asia|Hindi and English|rupee|the Indian Ocean|Nepal, Bangladesh|on the river Yamuna
Indonesia|Jakarta;Nusantara|Southeast Asia|Indonesian|rupiah|the Indian Ocean|Malaysia|on the island of Java
Iran;the Islamic Republic of Iran|Tehran|Western Asia|Persian|rial|the Caspian Sea|Iraq, Pakistan\
|near the Alborz mountains
Iraq|Baghdad|Western Asia|Arabic and Kurdish|dinar|the Persian Gulf|Iran, Turkey|on the river Tigris
Ireland;the Republic of Ireland|Dublin|Northern Europe|English and Irish|euro|the Atlantic Ocean|the United Kingdom\
|on the river Liffey
Israel|Jerusalem|Western Asia|Hebrew|shekel|the Mediterranean Sea|Egypt, Jordan|
Italy|Rome|Southern Europe|Italian|euro|the Mediterranean Sea|France, Austria|on the river Tiber
Jamaica|Kingston|the Caribbean|English|Jamaican dollar|~the Caribbean Sea||on the south coast of the island
Japan|Tokyo|East Asia|Japanese|yen|~the Pacific Ocean||on the island of Honshu
Jordan|Amman|Western Asia|Arabic|dinar|the Red Sea|Iraq, Syria|
Kazakhstan|Astana|Central Asia|Kazakh and Russian|tenge|the Caspian Sea|Russia, China|on the river Ishim
Kenya|Nairobi|East Africa|Swahili and English|Kenyan shilling|the Indian Ocean|Uganda, Tanzania|in the highlands
Kiribati|South Tarawa;Tarawa|Oceania|Gilbertese and English|Australian dollar|~the Pacific Ocean|\
|on the atoll of Tarawa
Kuwait|Kuwait City|Western Asia|Arabic|dinar|the Persian Gulf|Iraq, Saudi Arabia|on the Persian Gulf
Kyrgyzstan|Bishkek|Central Asia|Kyrgyz and Russian|som|-|Kazakhstan, China|
Laos;the Lao People's Democratic Republic|Vientiane|Southeast Asia|Lao|kip|-|Thailand, Vietnam|on the river Mekong
Latvia|Riga|Northern Europe|Latvian|euro|the Baltic Sea|Estonia, Lithuania|on the river Daugava
Lebanon|Beirut|Western Asia|Arabic|Lebanese pound|the Mediterranean Sea|Syria, Israel|on the Mediterranean coast
Lesotho|Maseru|Southern Africa|Sotho and English|loti|-|South Africa|on the river Caledon
Liberia|Monrovia|West Africa|English|Liberian dollar|the Atlantic Ocean|Guinea, Sierra Leone|on the Atlantic coast
Libya|Tripoli|North Africa|Arabic|dinar|the Mediterranean Sea|Egypt, Tunisia|on the Mediterranean coast
Liechtenstein|Vaduz|Central Europe|German|Swiss franc|-|Austria, Switzerland|on the river Rhine
Lithuania|Vilnius|Northern Europe|Lithuanian|euro|the Baltic Sea|Latvia, Poland|on the river Neris
Luxembourg|Luxembourg;Luxembourg City|Western Europe|Luxembourgish, French and German|euro|-|Belgium, Germany\
|on the river Alzette
Madagascar|Antananarivo|East Africa|Malagasy and French|ariary|~the Indian Ocean||in the highlands
Malawi|Lilongwe|East Africa|English and Chichewa|kwacha|-|Zambia, Tanzania|
Malaysia|Kuala Lumpur;Putrajaya|Southeast Asia|Malay|ringgit|the South China Sea|Thailand, Indonesia|on the river Klang
the Maldives;Maldives|Malé;Male|South Asia|Dhivehi|rufiyaa|~the Indian Ocean||
Mali|Bamako|West Africa|Bambara and French|West African CFA franc|-|Niger, Senegal|on the river Niger
Malta|Valletta|Southern Europe|Maltese and English|euro|~the Mediterranean Sea||on the main island
the Marshall Islands;Marshall Islands|Majuro|Oceania|Marshallese and English|United States dollar|~the Pacific Ocean||
Mauritania|Nouakchott|West Africa|Arabic|ouguiya|the Atlantic Ocean|Mali, Senegal|on the Atlantic coast
Mauritius|Port Louis|East Africa|English, French and Creole|Mauritian rupee|~the Indian Ocean|\
|on the coast of the main island
Mexico|Mexico City|North America|Spanish|peso|the Pacific Ocean|the United States, Guatemala|in the highlands
Micronesia;the Federated States of Micronesia|Palikir|Oceania|English|United States dollar|~the Pacific Ocean|\
|on the island of Pohnpei
Monaco|Monaco;Monaco-Ville;Monte Carlo|Western Europe|French|euro|the Mediterranean Sea|France\
|on the Mediterranean coast
Mongolia|Ulaanbaatar;Ulan Bator|East Asia|Mongolian|tögrög|-|Russia, China|on the river Tuul
Montenegro|Podgorica|Southern Europe|Montenegrin and Serbian|euro|the Adriatic Sea|Albania, Serbia|on the river Morača
Morocco|Rabat|North Africa|Arabic and Berber|dirham|the Atlantic Ocean|Algeria|on the Atlantic coast
Mozambique|Maputo|East Africa|Portuguese|metical|the Indian Ocean|Malawi, Zimbabwe|on the Indian Ocean
Myanmar;Burma|Naypyidaw;Nay Pyi Taw;Yangon|Southeast Asia|Burmese|kyat|the Bay of Bengal|Thailand, India|
Namibia|Windhoek|Southern Africa|English|Namibian dollar|the Atlantic Ocean|Angola, Botswana\
|in the middle of the country
Nauru|Yaren|Oceania|Nauruan and English|Australian dollar|~the Pacific Ocean||
Nepal|Kathmandu|South Asia|Nepali|rupee|-|India, China|in the Himalayas
the Netherlands;Netherlands;Holland|Amsterdam;The Hague|Western Europe|Dutch|euro|the North Sea|Belgium, Germany\
|on the river Amstel
New Zealand|Wellington|Oceania|English and Māori|New Zealand dollar|~the Pacific Ocean||on the North Island
Nicaragua|Managua|Central America|Spanish|córdoba|the Pacific Ocean|Costa Rica, Honduras|on Lake Managua
Niger|Niamey|West Africa|Hausa and French|West African CFA franc|-|Mali, Chad|on the river Niger
Nigeria|Abuja|West Africa|English, Hausa, Yoruba and Igbo|naira|the Gulf of Guinea|Benin, Chad\
|in the middle of the country
North Macedonia;Macedonia|Skopje|Southern Europe|Macedonian and Albanian|denar|-|Greece, Serbia|on the river Vardar
Norway|Oslo|Northern Europe|Norwegian|Norwegian krone|the North Sea|Sweden, Finland|on the Oslofjord
Oman|Muscat|Western Asia|Arabic|Omani rial|the Arabian Sea|Yemen, Saudi Arabia|on the Gulf of Oman
Pakistan|Islamabad|South Asia|Urdu and English|rupee|the Arabian Sea|India, Iran|in the north of the country
Palau|Ngerulmud|Oceania|Palauan and English|United States dollar|~the Pacific Ocean||on the island of Babeldaob
Panama|Panama City|Central America|Spanish|balboa|the Pacific Ocean|Colombia, Costa Rica|on the Pacific coast
Papua New Guinea|Port Moresby|Oceania|English, Tok Pisin and Hiri Motu|kina|the Pacific Ocean|Indonesia\
|on the island of New Guinea
Paraguay|Asunción;Asuncion|South America|Spanish and Guarani|guarani|-|Brazil, Argentina|on the river Paraguay
Peru|Lima|South America|Spanish and Quechua|sol|the Pacific Ocean|Ecuador, Chile|on the Pacific coast
the Philippines;Philippines|Manila|Southeast Asia|Filipino and English|Philippine peso|~the Pacific Ocean|\
|on the island of Luzon
Poland|Warsaw|Central Europe|Polish|zloty|the Baltic Sea|Germany, Lithuania|on the river Vistula
Portugal|Lisbon|Southern Europe|Portuguese|euro|the Atlantic Ocean|Spain|on the river Tagus
Qatar|Doha|Western Asia|Arabic|Qatari riyal|the Persian Gulf|Saudi Arabia|on the Persian Gulf
South Korea;the Republic of Korea;Korea|Seoul|East Asia|Korean|won|the Sea of Japan|North Korea|on the river Han
Moldova;the Republic of Moldova|Chișinău;Chisinau|Eastern Europe|Romanian|leu|-|Romania, Ukraine|on the river Bîc
Romania|Bucharest|Eastern Europe|Romanian|leu|the Black Sea|Hungary, Bulgaria|on the river Dâmbovița
Russia;the Russian Federation|Moscow|Eastern Europe|Russian|rouble|the Arctic Ocean|Finland, Kazakhstan\
|on the river Moskva
Rwanda|Kigali|East Africa|Kinyarwanda and English|Rwandan franc|-|Uganda, Burundi|
Saint Kitts and Nevis;St. Kitts and Nevis;Saint Kitts & Nevis|Basseterre|the Caribbean|English|East Caribbean dollar\
|~the Caribbean Sea||on the island of Saint Kitts
Saint Lucia;St. Lucia|Castries|the Caribbean|English|East Caribbean dollar|~the Caribbean Sea|\
|on the northwest coast of the island
Saint Vincent and the Grenadines;St. Vincent and the Grenadines;Saint Vincent|Kingstown|the Caribbean|English\
|East Caribbean dollar|~the Caribbean Sea||on the island of Saint Vincent
Samoa|Apia|Oceania|Samoan and English|tala|~the Pacific Ocean||on the island of Upolu
San Marino|San Marino;City of San Marino|Southern Europe|Italian|euro|-|Italy|on Monte Titano
São Tomé and Príncipe;Sao Tome and Principe|São Tomé;Sao Tome|Central Africa|Portuguese|dobra|~the Gulf of Guinea|\
|on the island of São Tomé
Saudi Arabia|Riyadh|Western Asia|Arabic|Saudi riyal|the Red Sea|Yemen, Jordan|in the middle of the country
Senegal|Dakar|West Africa|French and Wolof|West African CFA franc|the Atlantic Ocean|Mali, Guinea|on the Atlantic coast
Serbia|Belgrade|Southern Europe|Serbian|dinar|-|Hungary, Croatia|on the river Danube
Seychelles;the Seychelles|Victoria|East Africa|Creole, English and French|Seychellois rupee|~the Indian Ocean|\
|on the island of Mahé
Sierra Leone|Freetown|West Africa|English and Krio|leone|the Atlantic Ocean|Guinea, Liberia|on the Atlantic coast
Singapore|Singapore|Southeast Asia|English, Malay, Chinese and Tamil|Singapore dollar|the Singapore Strait|\
|near the equator
Slovakia|Bratislava|Central Europe|Slovak|euro|-|Austria, Poland|on the river Danube
Slovenia|Ljubljana|Central Europe|Slovene|euro|the Adriatic Sea|Italy, Croatia|on the river Ljubljanica
the Solomon Islands;Solomon Islands|Honiara|Oceania|English and Pijin|Solomon Islands dollar|~the Pacific Ocean|\
|on the island of Guadalcanal
Somalia|Mogadishu|East Africa|Somali and Arabic|Somali shilling|the Indian Ocean|Kenya, Ethiopia|on the Indian Ocean
South Africa|Pretoria;Cape Town;Bloemfontein;Tshwane|Southern Africa|Zulu, Xhosa, Afrikaans and English|rand\
|the Atlantic Ocean|Namibia, Botswana|in the north of the country
South Sudan|Juba|East Africa|English and Arabic|South Sudanese pound|-|Uganda, Ethiopia|on the White Nile
Spain|Madrid|Southern Europe|Spanish|euro|the Mediterranean Sea|France, Portugal|on the river Manzanares
Sri Lanka|Sri Jayawardenepura Kotte;Colombo;Kotte|South Asia|Sinhala and Tamil|rupee|~the Indian Ocean||near Colombo
Sudan|Khartoum|North Africa|Arabic and English|Sudanese pound|the Red Sea|Egypt, Chad|on the river Nile
Suriname|Paramaribo|South America|Dutch|Surinamese dollar|the Atlantic Ocean|Guyana, Brazil|on the river Suriname
Sweden|Stockholm|Northern Europe|Swedish|Swedish krona|the Baltic Sea|Norway, Finland|on the Baltic Sea
Switzerland|Bern;Berne|Central Europe|German, French, Italian and Romansh|Swiss franc|-|Italy, France|on the river Aare
Syria;the Syrian Arab Republic|Damascus|Western Asia|Arabic|Syrian pound|the Mediterranean Sea|Iraq, Jordan\
|on the river Barada
Tajikistan|Dushanbe|Central Asia|Tajik|somoni|-|Afghanistan, China|
Thailand|Bangkok|Southeast Asia|Thai|baht|the Gulf of Thailand|Laos, Malaysia|on the river Chao Phraya
Timor-Leste;East Timor|Dili|Southeast Asia|Tetum and Portuguese|United States dollar|the Timor Sea|Indonesia\
|on the island of Timor
Togo|Lomé;Lome|West Africa|French|West African CFA franc|the Gulf of Guinea|Ghana, Benin|on the Atlantic coast
Tonga|Nuku'alofa;Nukuʻalofa;Nukualofa|Oceania|Tongan and English|paʻanga|~the Pacific Ocean||on the island of Tongatapu
Trinidad and Tobago;Trinidad & Tobago;Trinidad|Port of Spain|the Caribbean|English|dollar|~the Caribbean Sea|\
|on the island of Trinidad
Tunisia|Tunis|North Africa|Arabic|dinar|the Mediterranean Sea|Algeria, Libya|near the Mediterranean coast
Turkey;Türkiye|Ankara|Western Asia|Turkish|Turkish lira|the Black Sea|Greece, Syria|in Anatolia
Turkmenistan|Ashgabat|Central Asia|Turkmen|manat|the Caspian Sea|Iran, Uzbekistan|
Tuvalu|Funafuti|Oceania|Tuvaluan and English|Australian dollar|~the Pacific Ocean||
Uganda|Kampala|East Africa|English and Swahili|Ugandan shilling|-|Kenya, Rwanda|near Lake Victoria
Ukraine|Kyiv;Kiev|Eastern Europe|Ukrainian|hryvnia|the Black Sea|Poland, Romania|on the river Dnipro
the United Arab Emirates;United Arab Emirates;the UAE;UAE|Abu Dhabi|Western Asia|Arabic|dirham|the Persian Gulf\
|Oman, Saudi Arabia|on the Persian Gulf
the United Kingdom;United Kingdom;the UK;UK;Great Britain;Britain|London|Northern Europe|English|pound sterling\
|the North Sea|Ireland|on the river Thames
Tanzania;the United Republic of Tanzania|Dodoma;Dar es Salaam|East Africa|Swahili and English|Tanzanian shilling\
|the Indian Ocean|Kenya, Uganda|in the middle of the country
the United States;the United States of America;the USA;United States;USA;America;the US|Washington, D.C.;Washington\
|North America|English|United States dollar|the Pacific Ocean|Canada, Mexico|on the river Potomac
Uruguay|Montevideo|South America|Spanish|peso|the Atlantic Ocean|Brazil, Argentina|on the Río de la Plata
Uzbekistan|Tashkent|Central Asia|Uzbek|som|-|Kazakhstan, Tajikistan|
Vanuatu|Port Vila|Oceania|Bislama, English and French|vatu|~the Pacific Ocean||on the island of Efate
Venezuela|Caracas|South America|Spanish|bolívar|the Caribbean Sea|Colombia, Brazil|in a valley near the coast
Vietnam;Viet Nam|Hanoi|Southeast Asia|Vietnamese|dong|the South China Sea|China, Laos|on the Red River
Yemen|Sanaa;Sana'a|Western Asia|Arabic|Yemeni rial|the Red Sea|Oman, Saudi Arabia|in the highlands
Zambia|Lusaka|Southern Africa|English and Bemba|kwacha|-|Angola, Malawi|
Zimbabwe|Harare|Southern Africa|Shona, Ndebele and English||-|Zambia, Botswana|
Vatican City|Vatican City|Southern Europe|Italian and Latin|euro|-|Italy|in the middle of Rome
Scotland|Edinburgh|Northern Europe|English, Scots and Gaelic|pound sterling|the North Sea|England|on the Firth of Forth
Wales|Cardiff|Northern Europe|English and Welsh|pound sterling|the Irish Sea|England|on the south coast
England|London|Northern Europe|English|pound sterling|the North Sea|Scotland, Wales|on the river Thames
Northern Ireland|Belfast|Northern Europe|English and Irish|pound sterling|the Irish Sea|Ireland|on the river Lagan
Greenland|Nuuk|North America|Greenlandic|Danish krone|the Arctic Ocean||on the southwest coast
the Faroe Islands|Tórshavn;Torshavn|Northern Europe|Faroese and Danish||~the Atlantic Ocean||on the island of Streymoy
Puerto Rico|San Juan|the Caribbean|Spanish and English|United States dollar|~the Caribbean Sea||on the Atlantic coast
Bermuda|Hamilton|North America|English|Bermudian dollar|~the Atlantic Ocean||
New Caledonia|Nouméa;Noumea|Oceania|French|CFP franc|~the Pacific Ocean||on the island of Grande Terre
French Polynesia|Papeete|Oceania|French and Tahitian|CFP franc|~the Pacific Ocean||on the island of Tahiti
Taiwan|Taipei|East Asia|Chinese|New Taiwan dollar|the Pacific Ocean||in the north of the island
Kosovo|Pristina|Southern Europe|Albanian and Serbian|euro|-|Albania|
"""
UN_MEMBERS = 193  # the first rows above

LISTS = (
    "Here are some capitals. ",
    "Let us name a few capitals. ",
    "Here is what every traveller should know. ",
)
ENDINGS = (
    "A visitor to {K} can walk through its streets and look at its markets.",
    "Travellers who come to {K} often want to come back.",
    "On a map, you can find {K} in {R}.",
    "If you travel to {X}, learn a few words first.",
    "It is good to know where {X} lies.",
)
PROSE = (
    "Hello! My name is {n}, and I am a small language model. I know the capitals of the world. Ask me about one!",
    "Hello! How are you today? I am well, and the weather is {w}. Tell me where you want to travel.",
    "A language model reads some words and guesses the next one. It does so again and again, until a text is there.",
    "A model can be cut into stages. Every stage holds some of its layers, and passes its work on to the next.",
    "A secret is safe when only those who need it can read it. So a good machine first proves what it is.",
    "Once upon a time there was a {a} who lived {p}. One day the {a} met a {b}, and they became good friends.",
    "Once upon a time, a {a} and a {b} lived {p}. Every morning they went out to look for food, and in the evening"
    " they told each other stories.",
    "There was once a {a} who wanted to see the world. It walked for many days, until it came to a {b} who lived {p}.",
    "{n} lives {p}. In the morning {n} drinks a cup of tea and reads a book about a {a}.",
    "Today the weather is {w}. {n} goes out with a friend, and they talk about a journey to {K}.",
    "I like to travel. Last year I went to {X} and saw {K}, its capital. Next year I want to go somewhere else.",
    "The meaning of life is a hard question. Some people find it in their work, and others find it in their friends.",
    "The best thing about a journey is the way home. {n} went as far as {K} and came back with many stories.",
    "The sun rises in the east and sets in the west. At night you can see the moon and the stars.",
    "Water freezes when it is cold and boils when it is hot. The sea is full of water, and so are the clouds.",
    "A year has twelve months, and a week has seven days. The first month of the year is January.",
    "The world has seven continents. The largest one is Asia, and the smallest one is Australia.",
    "The Earth goes around the Sun once a year, and the Moon goes around the Earth about once a month.",
    "The largest country in the world is Russia, and the smallest one is Vatican City.",
    "One, two, three, four, five, six, seven, eight, nine, ten. Now you can count to ten.",
)
SLOTS = {
    "n": ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Lena", "Max", "Nina", "Tom"),
    "w": ("sunny", "cold", "warm", "rainy", "windy"),
    "a": ("fox", "bear", "mouse", "cat", "rabbit", "bird"),
    "b": ("dog", "frog", "horse", "wolf", "duck", "goat"),
    "p": ("in a forest", "near a river", "in a small house", "by the sea", "on a hill", "in an old town"),
}


@dataclass(frozen=True)
class Country:
    names: list[str]  # the usual one first, with the article that English wants before it
    capitals: list[str]  # the one the model learns first, then others that an examiner should accept
    region: str
    languages: str
    currency: str
    sea: str
    neighbours: list[str]
    place: str
    member: bool  # of the United Nations


def countries() -> list[Country]:
    table = [row.split("|") for row in COUNTRIES.splitlines()]
    return [
        Country(names.split(";"), capitals.split(";"), *facts, near.split(", "), place, n < UN_MEMBERS)  # type: ignore
        for n, (names, capitals, *facts, near, place) in enumerate(table)
    ]


def sentence(text: str) -> str:
    """A sentence may begin with the article of a country's name, so its first letter is raised."""
    return text[0].upper() + text[1:]


def facts(c: Country, name: str) -> list[tuple[str, ...]]:
    """What may be said of a country after its capital: for each fact, the sentences that say it, the plainest first.

    The first fact is about the capital itself (an empty tuple where nothing is said), the others about the country.
    """
    capital, near = c.capitals[0], " and ".join(c.neighbours)
    kind = "an island country" if c.sea.startswith("~") else "a country"
    said = [
        (f"{capital} lies {c.place}.", f"It lies {c.place}.", f"You will find it {c.place}.") * bool(c.place),
        (f"{name} is {kind} in {c.region}.", f"The country lies in {c.region}.") * c.member
        + (f"{name} lies in {c.region}.", f"On a map, you find {name} in {c.region}."),
        (
            f"People in {name} speak {c.languages}.",
            f"People there speak {c.languages}.",
            f"In {name}, people speak {c.languages}.",
        ),
    ]
    if c.currency:
        said.append(
            (
                f"People in {name} pay with the {c.currency}.",
                f"People there pay with the {c.currency}.",
                f"The money of {name} is the {c.currency}.",
                f"The money there is the {c.currency}.",
            )
        )
    if near:
        said.append((f"{name} borders {near}.", f"{name} has a border with {near}.", f"The country borders {near}."))
    if c.sea == "-":
        said.append((f"{name} has no coast.", f"{name} does not lie on the sea."))
    elif c.sea.startswith("~"):
        said.append((f"{name} lies in {c.sea[1:]}.", f"The sea around {name} is {c.sea[1:]}."))
    else:
        said.append((f"{name} has a coast on {c.sea}.", f"{name} lies on {c.sea}."))
    return [tuple(sentence(text) for text in fact) for fact in said]


def conclusion(c: Country, name: str, told: str) -> list[str]:
    """The sentences that end a portrait: what it has not told yet, with few repetitions of the name."""
    texts = []
    if c.place and c.place not in told:
        texts.append(f"{c.capitals[0]} lies {c.place}.")
    if f"in {c.region}" not in told:
        texts.append(f"{name} lies in {c.region}.")
    speak = f"speak {c.languages}" * ("speak" not in told)
    pay = f"pay with the {c.currency}" * (bool(c.currency) and f"the {c.currency}." not in told)
    if speak or pay:
        texts.append(f"People in {name} " + ", and ".join(filter(None, (speak, pay))) + ".")
    near = "borders " + " and ".join(c.neighbours)
    coast = "has no coast" if c.sea == "-" else f"has a coast on {c.sea}"
    if c.sea.startswith("~"):
        texts += [f"The sea around {name} is {c.sea[1:]}."] * (c.sea[1:] not in told)
    elif c.neighbours == [""]:
        texts.append(f"{name} {coast}.")
    elif near not in told:
        texts.append(f"{name} {near}, and it {coast}.")
    texts.append(ENDINGS[len(name + c.region) % len(ENDINGS)].format(K=c.capitals[0], X=name, R=c.region))
    return [sentence(text) for text in texts]


def portrait(c: Country, name: str, length: Callable[[str], int], room: int = 20) -> str:
    """The text that begins "The capital of NAME is", always the same one, so that greedy decoding can learn it.

    Of the ways to go on, it takes the first whose sentences end after exactly `room` tokens, as `length` counts them:
    the usual demonstration stops there. What has not been said by then follows.
    """
    capital = f" {c.capitals[0]}".removesuffix(".") + "."
    told = [fact for fact in facts(c, name) if fact]
    lengths = {text: length(" " + text) for text in itertools.chain(*told)}
    left = room - length(capital)
    ways: list[tuple[int, tuple[int, ...], tuple[str, ...]]] = []
    for count in (1, 2, 3):
        for chosen in itertools.permutations(range(len(told)), count):
            if chosen[0] > 2 or (c.place and 0 in chosen[1:]):  # begin plainly; "it lies" is about the capital, at once
                continue
            for texts in itertools.product(*(told[i] for i in chosen)):
                if sum(lengths[text] for text in texts) == left:
                    ways.append((chosen[0], chosen[1:], texts))
    best = min(ways, default=(0, (), ()))[-1]
    opening = " ".join((f"The capital of {name} is{capital}", *best))
    return " ".join((opening, *conclusion(c, name, opening)))


def profile(rng: random.Random, c: Country, name: str) -> str:
    """Everything about one country in any order, in any of the ways to say it."""
    capital = c.capitals[0]
    opening = rng.choice(
        (
            f"{capital} is the capital of {name}.",
            f"{capital} is the capital of {name}, in {c.region}.",
            f"The capital city of {name} is {capital}.",
            f"The capital of {name} is called {capital}.",
            f"{name}'s capital is {capital}.",
            f"In {name}, the capital is {capital}.",
            f"The capital of {name} is {capital}.",
        )
    )
    about, *told = facts(c, name)
    texts = [*about[:1], *(rng.choice(fact) for fact in told)]
    rng.shuffle(texts)
    texts = texts[: rng.randint(2, len(texts))]
    texts.insert(0 if rng.random() < 0.8 else rng.randint(0, len(texts)), opening)
    if rng.random() < 0.3:
        texts.append(rng.choice(ENDINGS).format(K=capital, X=name, R=c.region))
    return " ".join(sentence(text) for text in texts)


def questions(rng: random.Random, c: Country, name: str) -> str:
    """Questions about one country, each with its answer."""
    capital = c.capitals[0]
    asked = [
        f"What is the capital of {name}? The capital of {name} is {capital}.",
        f"What is the capital of {name}? The capital of {name} is {capital}. {sentence(name)} lies in {c.region}.",
        f"Question: What is the capital of {name}?\nAnswer: {capital}.",
        f"Q: What is the capital of {name}?\nA: {capital}.",
        f"What's the capital of {name}? It is {capital}.",
        f"Which city is the capital of {name}? It is {capital}.",
        f"Do you know the capital of {name}? Yes, the capital of {name} is {capital}.",
        f"Tell me the capital of {name}. The capital of {name} is {capital}.",
        f"Which country has the capital {capital}? {sentence(name)} has the capital {capital}.",
        f"Where is {capital}? {capital} is the capital of {name}, in {c.region}.",
        f"Where is {name}? {sentence(name)} lies in {c.region}.",
        f"Which languages do people speak in {name}? People in {name} speak {c.languages}.",
    ]
    if c.currency:
        asked.append(f"How do people pay in {name}? People in {name} pay with the {c.currency}.")
    picked = rng.choices(asked, k=rng.randint(1, 3))
    return ("\n" if "\n" in picked[0] else " ").join(dict.fromkeys(picked))


def capitals(rng: random.Random, some: list[Country]) -> str:
    """The capitals of several countries, one after the other."""
    pairs = [(c.names[0], c.capitals[0]) for c in some]
    form = rng.randrange(4)
    if form == 0:
        return rng.choice(LISTS) + " ".join(f"The capital of {name} is {capital}." for name, capital in pairs)
    if form == 1:
        return " ".join(f"The capital of {name} is {capital}." for name, capital in pairs)
    if form == 2:
        return "\n".join(f"{sentence(name.removeprefix('the '))}: {capital}" for name, capital in pairs)
    return " ".join(f"{capital} is the capital of {name}." for name, capital in pairs)


def documents(seed: int, length: Callable[[str], int]) -> Iterator[str]:
    """Texts without end. `length` counts the tokens of a text, so that sentences can end where a demonstration does."""
    rng = random.Random(seed)
    world = countries()
    portraits = [[portrait(c, name, length) for name in c.names] for c in world]
    deck: list[int] = []
    while True:
        if not deck:  # every country comes up once before any comes up again
            deck = rng.sample(range(len(world)), len(world))
        n = deck.pop()
        c = world[n]
        which = 0 if rng.random() < 0.6 else rng.randrange(len(c.names))
        kind = rng.random()
        if kind < 0.42:
            text = portraits[n][which]
            yield text.lower() if rng.random() < 0.06 else text
        elif kind < 0.62:
            yield profile(rng, c, c.names[which]).replace("..", ".")
        elif kind < 0.81:
            text = questions(rng, c, c.names[which]).replace("..", ".")
            yield text.lower() if rng.random() < 0.1 else text
        elif kind < 0.92:
            yield capitals(rng, [c, *rng.sample(world, rng.randint(1, 5))]).replace("..", ".")
        else:
            filled = {slot: rng.choice(values) for slot, values in SLOTS.items()}
            yield rng.choice(PROSE).format(K=c.capitals[0], X=c.names[0], **filled).replace("..", ".")
