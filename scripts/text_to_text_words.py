"""The word lists and tables that `text_to_text_mix` draws from."""

# ruff: noqa: E501, SIM905
from __future__ import annotations

# The kinds of thing that records describe.  `noun: it` or `noun: human`, then the patterns of the
# name, then one attribute a line:
#     key, other key = value pattern ; vp verb phrases ; pp phrases after the noun ; adj adjectives
# with ` || ` between alternatives of one attribute that are worded differently.
DOMAINS = """
hotel: it
  name = Hotel {place} | {surname} House | The {adj} {noun} | {surname} Inn | {title}
  location, city, town = {place} ; vp is in {v} | stands in {v} | can be found in {v} | is located in {v} ; pp in {v} | located in {v}
  rooms, number of rooms, room count = {int:8-300} ; vp has {v} rooms | offers {v} rooms to its guests | counts {v} rooms ; pp with {v} rooms
  style, look = {pick:modern,rustic,elegant,plain,old-fashioned,grand} ; vp is {v} in style | has a(n) {v} look ; adj {v}
  pets, pets allowed = yes ; vp allows pets | welcomes guests with pets | is happy to take pets ; pp that allows pets || no ; vp does not allow pets | takes no pets | is not open to pets ; pp without pets
  owner, owned by = {person} ; vp is owned by {v} | belongs to {v} | is run by {v} ; pp owned by {v} | run by {v}
  near, nearby, close to = {pick:the station,the harbour,the river,the old market,the castle} ; vp is near {v} | is close to {v} | is not far from {v} ; pp near {v} | close to {v}
  near = {title} ; vp is near {v} | is next to {v} | can be found near {v} ; pp near {v} | close to {v} | by {v}
museum: it
  name = {place} Museum | Museum of {place} | {surname} Gallery | The {surname} Collection
  subject, topic, about = {pick:clocks,glass,trains,textiles,maps,toys,fossils,sculpture,radio} ; vp is about {v} | is devoted to {v} | shows {v} ; pp about {v} | devoted to {v}
  city, location, place = {place} ; vp is in {v} | is situated in {v} | can be visited in {v} ; pp in {v} | from {v}
  opened, year opened, founded = {year} ; vp opened in {v} | was founded in {v} | has been open since {v} ; pp opened in {v} | founded in {v}
  director, head = {person} ; vp is led by {v} | has {v} as its director | is headed by {v} ; pp led by {v} | directed by {v}
  entry, ticket, admission = free ; vp is free to enter | charges no admission | has free entry ; adj free || {int:2-30} euros ; vp costs {v} to enter | asks {v} for a ticket ; pp with tickets at {v}
  visitors, visitors a year = {int:900-900000} ; vp has {v} visitors a year | is seen by {v} people every year ; pp with {v} visitors a year
  size = {pick:small,large,tiny,vast} ; vp is {v} | is a(n) {v} place ; adj {v}
planet: it
  name = {new} | {new} {int:2-9} | {surname}'s World
  star, orbits, sun = {new} ; vp orbits {v} | circles the star {v} | goes around {v} ; pp orbiting {v}
  moons, number of moons = {int:2-40} ; vp has {v} moons | is circled by {v} moons ; pp with {v} moons
  surface, ground = {pick:icy,rocky,sandy,dusty,frozen} ; vp is {v} | has a(n) {v} surface ; adj {v}
  discovered by, discoverer, found by = {person} ; vp was discovered by {v} | was first seen by {v} ; pp discovered by {v}
  discovered, year of discovery = {year} ; vp was discovered in {v} | has been known since {v} ; pp discovered in {v}
  colour, color = {pick:red,blue,grey,green,orange} ; vp looks {v} | is {v} in colour ; adj {v}
  day length, length of day = {int:5-90} hours ; vp has a day of {v} | turns once in {v} ; pp with a day of {v}
ship: it
  name = the {title} | {new} | the {surname} | Queen {new}
  built, year, launched = {year} ; vp was built in {v} | was launched in {v} | first sailed in {v} ; pp built in {v} | from {v}
  home port, port, harbour = {place} ; vp sails from {v} | has its home port in {v} | is based in {v} ; pp from {v} | based in {v}
  captain, master = {person} ; vp is commanded by {v} | sails under captain {v} | has {v} as its captain ; pp under captain {v}
  cargo, carries, load = {pick:timber,grain,coal,wool,cars,oranges,steel} ; vp carries {v} | is loaded with {v} | transports {v} ; pp carrying {v}
  length, long = {int:12-300} metres ; vp is {v} long | measures {v} ; pp of {v}
  crew, crew size = {int:3-200} ; vp has a crew of {v} | needs {v} sailors ; pp with a crew of {v}
song: it
  name = {title} | {adj} {noun} | {new}
  singer, sung by, artist = {person} ; vp is sung by {v} | is a song by {v} | was recorded by {v} ; pp by {v} | sung by {v}
  year, released, release = {year} ; vp came out in {v} | was released in {v} | dates from {v} ; pp from {v} | released in {v}
  genre, kind, style = {pick:folk,jazz,pop,rock,soul,blues} ; vp is a(n) {v} song | belongs to {v} music ; adj {v}
  length, duration = {int:2-9} minutes ; vp lasts {v} | is {v} long ; pp of {v}
  album, record = {title} ; vp is on the album {v} | appears on {v} | is part of {v} ; pp from the album {v}
  written by, writer, composer = {person} ; vp was written by {v} | was composed by {v} ; pp written by {v} | composed by {v}
book: it
  name = {title} | {adj} {noun} | The {surname} Letters
  author, written by, writer = {person} ; vp was written by {v} | is by {v} | is the work of {v} ; pp by {v} | written by {v}
  year, published in, published = {year} ; vp was published in {v} | came out in {v} | first appeared in {v} ; pp from {v} | published in {v}
  pages, number of pages, page count = {int:60-900} ; vp has {v} pages | is {v} pages long | runs to {v} pages ; pp of {v} pages | with {v} pages
  language, written in = {pick:Danish,Welsh,Polish,Greek,Portuguese,Finnish} ; vp is written in {v} | was first written in {v} ; pp in {v}
  publisher, published by = {surname} Press ; vp was published by {v} | is sold by {v} | was printed by {v} ; pp published by {v}
  about, subject, topic = {pick:the sea,a lost letter,two sisters,a long winter,a trial} ; vp is about {v} | tells of {v} | deals with {v} ; pp about {v}
  awards, prize = {title} Prize ; vp won the {v} | was given the {v} | received the {v} ; pp that won the {v}
school: it
  name = {place} School | {surname} Academy | {surname} College
  town, city, location = {place} ; vp is in {v} | serves the town of {v} | lies in {v} ; pp in {v}
  pupils, students, number of pupils = {int:40-2000} ; vp has {v} pupils | teaches {v} children | is attended by {v} students ; pp with {v} pupils
  head, head teacher, principal = {person} ; vp is led by {v} | has {v} as its head | is headed by {v} ; pp led by {v}
  founded, opened, established = {year} ; vp was founded in {v} | opened in {v} | was established in {v} ; pp founded in {v}
  known for, strength = {pick:its choir,chess,science,its garden,languages,rowing} ; vp is known for {v} | is proud of {v} | is famous for {v} ; pp known for {v}
  uniform = yes ; vp has a uniform | asks its pupils to wear a uniform || no ; vp has no uniform | does without a uniform
bridge: it
  name = {surname} Bridge | {place} Bridge | the {adj} Bridge
  crosses, river, spans = the {new} ; vp crosses {v} | spans {v} | leads over {v} ; pp over {v} | across {v}
  length, long = {int:20-2500} metres ; vp is {v} long | has a length of {v} ; pp of {v} | with a length of {v}
  built, year built, completed = {year} ; vp was built in {v} | was completed in {v} | dates from {v} ; pp built in {v} | from {v}
  material, made of = {pick:stone,steel,concrete,iron} ; vp is made of {v} | is built of {v} ; adj {v}
  architect, designer, designed by = {person} ; vp was designed by {v} | is the work of {v} ; pp designed by {v}
  city, in, location = {place} ; vp is in {v} | stands in {v} | can be seen in {v} ; pp in {v}
bird: it
  name = {new} | the {adj} {new} | {surname}'s {pick:finch,heron,owl,thrush,gull}
  colour, color, plumage = {pick:brown,black,white,blue,yellow,grey} ; vp is {v} | has {v} feathers ; adj {v} ; pp with {v} feathers
  eats, diet, food = {pick:seeds,insects,fish,berries,worms,snails} ; vp eats {v} | lives on {v} | feeds on {v} ; pp that eats {v} | feeding on {v}
  lives in, habitat, found in = {pick:forests,marshes,deserts,gardens,reeds,the mountains} ; vp lives in {v} | is found in {v} | can be seen in {v} ; pp living in {v} | of {v}
  wingspan, span = {int:12-250} cm ; vp has a wingspan of {v} | measures {v} across the wings ; pp with a wingspan of {v}
  eggs, clutch = {int:2-9} ; vp lays {v} eggs | usually lays {v} eggs ; pp laying {v} eggs
  country, region, range = {place} ; vp comes from {v} | is native to {v} | breeds in {v} ; pp from {v} | native to {v}
plant: it
  name = {new} | {adj} {new} | {surname}'s {pick:lily,fern,moss,sage,violet}
  height, grows to = {int:5-400} cm ; vp grows to {v} | is up to {v} tall ; pp of up to {v} | growing to {v}
  flowers, flower colour, bloom = {pick:white,yellow,purple,pink,red} ; vp has {v} flowers | bears {v} flowers | shows {v} flowers in summer ; pp with {v} flowers
  soil, ground = {pick:sand,clay,chalk,peat,gravel} ; vp needs {v} | grows best on {v} | likes {v} ; pp growing on {v}
  light, sun = {pick:full sun,shade,half shade} ; vp prefers {v} | does well in {v} ; pp for {v}
  origin, native to, from = {place} ; vp comes from {v} | is native to {v} | was first found in {v} ; pp from {v} | native to {v}
  poisonous, toxic = yes ; vp is poisonous | must not be eaten ; adj poisonous || no ; vp is not poisonous | is harmless ; adj harmless
swimmer: human
  name = {person} | {person} {surname}
  country, nation, from = {place} ; vp comes from {v} | swims for {v} | represents {v} ; pp from {v}
  age, years = {int:16-40} ; vp is {v} years old | is {v} ; pp aged {v}
  coach, trainer, trained by = {person} ; vp is trained by {v} | works with the coach {v} | has {v} as a coach ; pp coached by {v} | trained by {v}
  medals, medals won = {int:2-30} ; vp has won {v} medals | owns {v} medals ; pp with {v} medals
  club, team = {place} {pick:Otters,Seals,Swifts,United} ; vp belongs to {v} | swims for {v} | is a member of {v} ; pp of {v}
  height, tall = {int:155-205} cm ; vp is {v} tall | measures {v} ; pp of {v}
  hand, writes with = {pick:left,right} hand ; vp writes with the {v} | uses the {v}
phone: it
  name = {new} {int:2-15} | {surname} {pick:Mini,Max,Plus,One} | {new} {pick:X,S,Pro}
  maker, brand, made by = {new} ; vp is made by {v} | comes from {v} | is a product of {v} ; pp by {v} | from {v}
  price, cost, costs = {int:80-1500} dollars ; vp costs {v} | is sold for {v} | has a price of {v} ; pp for {v} | at {v}
  battery, battery life = {int:8-60} hours ; vp runs for {v} | has a battery life of {v} | lasts {v} on one charge ; pp with a battery life of {v}
  colour, color, finish = {pick:black,silver,blue,gold,green,white} ; vp comes in {v} | is {v} ; adj {v} ; pp in {v}
  screen, display, screen size = {pick:5,5.5,6,6.2,6.7} inches ; vp has a screen of {v} | measures {v} ; pp with a screen of {v}
  waterproof, water resistant = yes ; vp is waterproof | can be used in the rain ; adj waterproof || no ; vp is not waterproof | should be kept dry
  released, year, launch = {int:2005-2024} ; vp came out in {v} | was released in {v} | was launched in {v} ; pp released in {v} | from {v}
mineral: it
  name = {new}ite | {new}ine | {surname}ite
  colour, color = {pick:green,black,white,violet,red,yellow} ; vp is {v} | is {v} in colour ; adj {v}
  hardness, scratch hardness = {pick:2,3,4.5,6,7,8} ; vp has a hardness of {v} | reaches {v} on the scale of hardness ; pp with a hardness of {v}
  found in, location, mined in = {place} ; vp is found in {v} | is mined in {v} | comes from {v} ; pp from {v} | found in {v}
  used for, use = {pick:jewels,paint,glass,paper,lamps,batteries} ; vp is used for {v} | serves to make {v} | goes into {v} ; pp used for {v}
  discovered by, first described by = {person} ; vp was discovered by {v} | was first described by {v} ; pp discovered by {v}
  rarity, frequency = {pick:rare,common} ; vp is {v} | is quite {v} ; adj {v}
festival: it
  name = {place} Festival | {title} Days | {place} {pick:Jazz,Film,Book,Light} Week
  month, when, held in = {pick:January,March,April,May,June,July,September,October} ; vp is held in {v} | takes place in {v} | is celebrated in {v} ; pp in {v} | held in {v}
  place, city, location = {place} ; vp is held in {v} | takes place in {v} | is at home in {v} ; pp in {v} | held in {v}
  lasts, duration, length = {int:2-14} days ; vp lasts {v} | goes on for {v} ; pp of {v} | lasting {v}
  visitors, guests, attendance = {int:300-90000} ; vp draws {v} visitors | is attended by {v} people ; pp with {v} visitors
  organiser, organised by, host = {person} ; vp is organised by {v} | is hosted by {v} ; pp organised by {v}
  since, first held, started = {year} ; vp has been held since {v} | was first held in {v} | started in {v} ; pp held since {v}
island: it
  name = {place} | {surname} Island | Isle of {new}
  sea, ocean, lies in = {pick:the North Sea,the Baltic Sea,the Pacific,the Atlantic,the Indian Ocean} ; vp lies in {v} | is in {v} | rises from {v} ; pp in {v}
  area, size = {int:2-9000} square km ; vp covers {v} | has an area of {v} ; pp of {v} | with an area of {v}
  people, inhabitants, population = {int:12-90000} ; vp has {v} inhabitants | is home to {v} people | has a population of {v} ; pp with {v} inhabitants
  capital, main town, largest town = {place} ; vp has {v} as its capital | is governed from {v} ; pp with the capital {v}
  highest point, peak = Mount {new} ; vp has its highest point at {v} | is topped by {v} ; pp with the peak {v}
  language, spoken = {new}ish ; vp is a place where people speak {v} | has {v} as its language ; pp where {v} is spoken
  exports, product = {pick:salt,cheese,wool,fish,honey,copper} ; vp exports {v} | lives from {v} | sells {v} ; pp known for {v}
engineer: human
  name = {person} | {person} {surname} | Dr {surname}
  employer, works for, company = {new} {pick:Systems,Works,Motors,Labs} ; vp works for {v} | is employed by {v} | has a job at {v} ; pp at {v} | from {v}
  born in, birthplace, place of birth = {place} ; vp was born in {v} | comes from {v} | grew up in {v} ; pp from {v} | born in {v}
  born, birth year, year of birth = {int:1930-2000} ; vp was born in {v} ; pp born in {v}
  field, works on, speciality = {pick:turbines,brakes,sensors,lenses,engines,pumps} ; vp works on {v} | designs {v} | knows a lot about {v} ; pp working on {v}
  speaks, language, languages = {pick:Dutch,Czech,Arabic,Korean,Hindi,Turkish} ; vp speaks {v} | has learnt {v} | is fluent in {v} ; pp who speaks {v}
  studied at, university, alma mater = {place} University ; vp studied at {v} | has a degree from {v} | graduated from {v} ; pp with a degree from {v}
  salary, pay = {int:2000-9000} dollars a month ; vp earns {v} | is paid {v} ; pp with a pay of {v}
bus: it
  name = line {int:2-99} | bus {int:2-99} | the {place} Express
  from, start, origin = {place} ; vp starts in {v} | leaves from {v} | departs from {v} ; pp from {v}
  to, end, destination = {place} ; vp goes to {v} | ends in {v} | runs to {v} ; pp to {v}
  stops, number of stops = {int:3-40} ; vp makes {v} stops | stops {v} times ; pp with {v} stops
  every, interval, frequency = {int:5-60} minutes ; vp runs every {v} | leaves every {v} ; pp running every {v}
  fare, price, ticket = {int:2-20} euros ; vp costs {v} | can be used for {v} ; pp for {v}
  driver, driven by = {person} ; vp is driven by {v} | has {v} at the wheel ; pp driven by {v}
  via, passes = {place} ; vp goes by way of {v} | passes through {v} ; pp via {v}
film: it
  name = {title} | {adj} {noun} | {new}
  director, directed by, made by = {person} ; vp was directed by {v} | is a film by {v} | was made by {v} ; pp by {v} | directed by {v}
  year, released, release year = {int:1925-2023} ; vp came out in {v} | was released in {v} | was shot in {v} ; pp from {v} | released in {v}
  starring, star, lead actor = {person} ; vp stars {v} | has {v} in the main role | features {v} ; pp starring {v} | with {v}
  genre, kind, type of film = {pick:silent,romantic,historical,comic,scary} ; vp is {v} | is rather {v} ; adj {v}
  length, running time, runtime = {int:70-190} minutes ; vp lasts {v} | runs for {v} | is {v} long ; pp of {v}
  country, made in = {place} ; vp was made in {v} | comes from {v} ; pp from {v}
  music, composer, score = {person} ; vp has music by {v} | was scored by {v} ; pp with music by {v}
farm: it
  name = {surname} Farm | {place} Farm | {adj} {pick:Acre,Field,Meadow} Farm
  grows, crop, main crop = {pick:wheat,barley,apples,hops,beans,flax} ; vp grows {v} | produces {v} | lives from {v} ; pp growing {v}
  animals, keeps, livestock = {pick:sheep,goats,cows,geese,bees,horses} ; vp keeps {v} | raises {v} | is home to {v} ; pp with {v}
  area, size, land = {int:3-900} hectares ; vp covers {v} | has {v} of land ; pp of {v}
  farmer, owner, run by = {person} ; vp is run by {v} | belongs to {v} | is owned by {v} ; pp run by {v} | owned by {v}
  near, close to, next to = {place} ; vp lies near {v} | is close to {v} | is next to {v} ; pp near {v} | close to {v}
  organic, certified = yes ; vp is organic | works without chemicals ; adj organic || no ; vp is not organic | is not certified as organic
laboratory: it
  name = {surname} Laboratory | {place} Institute | {surname} Centre
  field, studies, research = {pick:sleep,soil,light,bacteria,plastics,memory,weather} ; vp studies {v} | does research on {v} | works on {v} ; pp for {v} | studying {v}
  head, director, leader = {person} ; vp is led by {v} | is directed by {v} | has {v} as its head ; pp led by {v} | under {v}
  staff, people, employees = {int:4-600} ; vp employs {v} people | has a staff of {v} ; pp with {v} employees
  city, place, location = {place} ; vp is in {v} | is based in {v} | is located in {v} ; pp in {v} | based in {v}
  founded, since, established = {year} ; vp was founded in {v} | has existed since {v} ; pp founded in {v}
  funded by, sponsor, money from = {surname} Foundation ; vp is funded by the {v} | gets its money from the {v} | is paid for by the {v} ; pp funded by the {v}
theatre: it
  name = {surname} Theatre | {title} | {place} Playhouse | Theatre {new}
  seats, capacity, number of seats = {int:40-2500} ; vp has {v} seats | seats {v} people | holds {v} guests ; pp with {v} seats
  area, district, part of town = {pick:the old town,the harbour district,the east end,the university quarter} ; vp is in {v} | stands in {v} | can be found in {v} ; pp in {v} | located in {v}
  near, close to, nearby = {title} ; vp is near {v} | stands close to {v} | is next to {v} ; pp near {v} | close to {v}
  plays, shows, programme = {pick:comedy,opera,ballet,tragedy,puppet shows,musicals} ; vp shows {v} | is a place for {v} | offers {v} ; pp for {v} | offering {v}
  mood, atmosphere = {pick:lively,quiet,cosy,formal,shabby} ; vp is {v} | has a(n) {v} atmosphere ; adj {v} ; pp with a(n) {v} atmosphere
  built, opened, since = {year} ; vp was built in {v} | opened in {v} | has been open since {v} ; pp built in {v} | from {v}
garden: it
  name = {surname} Gardens | {place} Park | The {adj} Garden | {title}
  open, hours, opening hours = {pick:all year,in summer,on weekends,until dusk,from nine to five} ; vp is open {v} | can be visited {v} ; pp open {v}
  feature, has, sight = {pick:a pond,a maze,a rose walk,a glass house,a tea house,an old oak} ; vp has {v} | offers {v} | features {v} ; pp with {v}
  near, beside, next to = {title} ; vp is near {v} | is beside {v} | lies next to {v} ; pp near {v} | beside {v}
  children, good for children = yes ; vp is good for children | welcomes children | is a good place for children || no ; vp is not meant for children | is not for children | does not welcome children
  size, area = {pick:small,large,narrow,hilly} ; vp is {v} | is rather {v} ; adj {v}
  gardener, keeper, kept by = {person} ; vp is kept by {v} | is looked after by {v} ; pp kept by {v}
  paths, length of paths = {int:2-30} km ; vp has {v} of paths | offers {v} of walks ; pp with {v} of paths
painter: human
  name = {person} {surname} | {person}
  born, year of birth, birth year = {int:1650-1990} ; vp was born in {v} ; pp born in {v}
  paints, subject, theme = {pick:ships,portraits,flowers,horses,empty rooms,winter scenes} ; vp paints {v} | is known for {v} | prefers to paint {v} ; pp who paints {v} | known for {v}
  married to, partner, wife or husband = {person} ; vp is married to {v} | shares a studio with {v} ; pp married to {v}
  lives in, home, town = {place} ; vp lives in {v} | works in {v} | has a studio in {v} ; pp from {v} | living in {v}
  best known work, main work, famous for = {title} ; vp painted {v} | is famous for {v} | became known for {v} ; pp famous for {v}
  pupil of, teacher, taught by = {person} ; vp was taught by {v} | learnt from {v} | was a pupil of {v} ; pp taught by {v}
  style, school = {pick:bold,careful,dreamy,plain,playful} ; vp has a(n) {v} style | paints in a(n) {v} style ; pp with a(n) {v} style
company: it
  name = {new} {pick:Group,Ltd,Brothers,Industries} | {surname} and {surname} | {new}
  makes, product, industry = {pick:shoes,tractors,lamps,soap,toys,bicycles,ovens} ; vp makes {v} | produces {v} | sells {v} ; pp that makes {v} | making {v}
  headquarters, based in, city = {place} ; vp is based in {v} | has its headquarters in {v} ; pp from {v} | based in {v}
  founder, founded by, started by = {person} ; vp was founded by {v} | was started by {v} ; pp founded by {v}
  employees, staff = {int:5-80000} ; vp has {v} employees | employs {v} people ; pp with {v} employees
  founded, year founded, since = {year} ; vp was founded in {v} | has existed since {v} ; pp founded in {v}
  parent, owned by, parent company = {new} ; vp is owned by {v} | belongs to {v} | is part of {v} ; pp owned by {v}
  revenue, sales = {int:2-900} million dollars ; vp has sales of {v} | earns {v} a year ; pp with sales of {v}
lighthouse: it
  name = {place} Light | Cape {new} | {surname} Point | {place} Lighthouse
  height, tall = {int:6-90} metres ; vp is {v} tall | rises {v} above the rocks ; pp of {v}
  colour, painted, color = {pick:red,white,striped,black,yellow} ; vp is painted {v} | is {v} | has {v} walls ; adj {v}
  range, seen from, reach = {int:4-40} miles ; vp can be seen from {v} away | has a range of {v} ; pp with a range of {v}
  built, lit since, year = {year} ; vp was built in {v} | has been lit since {v} ; pp built in {v} | from {v}
  keeper, kept by = {person} ; vp is kept by {v} | is looked after by {v} | has {v} as its keeper ; pp kept by {v}
  coast, stands on, location = the coast of {place} ; vp stands on {v} | guards {v} ; pp on {v}
board game: it
  name = {title} | {new} | {new} and {new} | {adj} {noun}
  inventor, invented by, designer = {person} ; vp was invented by {v} | was designed by {v} | is a game by {v} ; pp by {v} | invented by {v}
  players, number of players = {int:2-8} ; vp is for {v} players | needs {v} players | is played by {v} people ; pp for {v} players
  playing time, takes, duration = {int:5-240} minutes ; vp takes {v} | lasts about {v} ; pp that takes {v} | of {v}
  age, for ages, suitable from = {int:4-16} years ; vp is suitable from {v} | is meant for people of at least {v} ; pp suitable from {v}
  pieces, parts, number of pieces = {int:9-400} ; vp has {v} pieces | comes with {v} pieces ; pp with {v} pieces
  luck, needs luck = yes ; vp needs some luck | depends on luck || no ; vp needs no luck | does not depend on luck
  theme, about, set in = {pick:trade,pirates,dragons,railways,farming,the moon} ; vp is about {v} | deals with {v} ; pp about {v}
"""

FIRST_NAMES = (
    "Ada Alma Amir Anna Boris Carla Chen Clara Dario David Edith Elena Emil Farid Felix Fiona Greta "
    "Hana Hugo Ida Igor Ines Ivan Jonas Judith Karl Kofi Laila Leo Lena Lucia Luis Mara Maria Mark "
    "Milo Mina Nadia Nils Nora Olga Omar Otto Paul Petra Priya Rosa Ruben Sara Simon Sofia Sven "
    "Tara Thomas Tom Uma Vera Viktor Wanda Yara Yusuf Zoe John Mary James Robert Alice Helen Peter"
).split()

ADJECTIVES = (
    "old new red blue green golden silver white black small large quiet loud bright dark cold warm "
    "heavy light broken hidden wooden lonely clever gentle brave early late narrow wide deep empty "
    "full happy sad sharp soft round square simple strange common distant famous local modern plain "
    "rich royal silent slow quick strong sweet tall thin wild young clean dusty frozen ancient open"
).split()

NOUNS = (
    "lantern river garden window bottle letter table mirror ladder basket hammer candle bridge "
    "forest mountain valley harbour castle tower station library kitchen village market field road "
    "horse rabbit eagle wolf spider turtle salmon fox owl lion tiger bear crow swan goat apple "
    "orange pepper onion carrot cherry lemon olive bread butter honey sugar coffee wagon bicycle "
    "engine tractor sailor farmer doctor teacher painter baker soldier king queen child friend "
    "neighbour winter summer morning evening storm cloud shadow stone ring coin clock drum guitar "
    "piano trumpet violin book story picture poem map flag key door box rope coat hat shoe button "
    "pencil paper island lake beach desert star moon planet machine wheel needle plough cup plate "
    "dream song dance game puzzle question answer secret journey battle treasure crown sword anchor"
).split()

# base, third person, past, participle, -ing
VERBS = [
    tuple(line.split())
    for line in """
paint paints painted painted painting
clean cleans cleaned cleaned cleaning
carry carries carried carried carrying
build builds built built building
find finds found found finding
break breaks broke broken breaking
sell sells sold sold selling
repair repairs repaired repaired repairing
draw draws drew drawn drawing
hide hides hid hidden hiding
buy buys bought bought buying
move moves moved moved moving
open opens opened opened opening
choose chooses chose chosen choosing
steal steals stole stolen stealing
see sees saw seen seeing
take takes took taken taking
bring brings brought brought bringing
follow follows followed followed following
watch watches watched watched watching
forget forgets forgot forgotten forgetting
describe describes described described describing
lose loses lost lost losing
push pushes pushed pushed pushing
hold holds held held holding
""".strip().splitlines()
]

LABELS_POSITIVE = (
    "positive good great + happy up like yes 1 wonderful praise good: A thumbs-up".split()
)
LABELS_NEGATIVE = (
    "negative bad terrible - unhappy down dislike no 0 awful blame bad: B thumbs-down".split()
)

OPINION_SUBJECTS = {
    "product": "kettle,backpack,keyboard,lamp,blender,tent,jacket,printer,chair,headset,vacuum".split(
        ","
    ),
    "weather": "morning,afternoon,weekend,sky,summer,winter,wind,evening,climate".split(","),
    "travel": "ferry,train,hotel,flight,tour,guide,beach,museum,town,view".split(","),
    "work": "meeting,office,manager,report,training,schedule,team,project".split(","),
    "lesson": "teacher,lesson,exam,course,homework,lecture,textbook,class".split(","),
    "show": "play,concert,story,actor,song,ending,plot,band,dancer,scene".split(","),
}

POSITIVE = {
    "adjectives": (
        "good great excellent lovely wonderful pleasant superb delightful perfect charming reliable "
        "impressive brilliant enjoyable fine fantastic splendid beautiful clever satisfying"
    ).split(),
    "frames": [
        "the {s} was {a}.",
        "the {s} is {a} and {b}!",
        "I loved the {s}, it was so {a}.",
        "what a(n) {a} {s}!",
        "a(n) {a} {s} with a(n) {b} {o}.",
        "we enjoyed the {s} very much.",
        "I would recommend this {s} to everyone.",
        "the {o} was average, but the {s} was {a}.",
        "not bad at all, a really {a} {s}.",
        "the {s} was better than I had hoped.",
        "I am very happy with the {s}.",
        "it is hard to find a(n) {a} {s} like this one.",
        "{a}, {b}, and worth every minute.",
    ],
    "extras": [
        "I would do it again.", "thank you!", "five stars.", "everyone was pleased.",
        "it made my day.", "I cannot wait for more.",
    ],
}  # fmt: skip

NEGATIVE = {
    "adjectives": (
        "bad poor terrible awful dreadful unpleasant horrible boring useless annoying disappointing "
        "weak dull miserable ugly mediocre tiresome unreliable painful clumsy"
    ).split(),
    "frames": [
        "the {s} was {a}.",
        "the {s} is {a} and {b}!",
        "I hated the {s}, it was so {a}.",
        "what a(n) {a} {s}!",
        "a(n) {a} {s} with a(n) {b} {o}.",
        "we did not enjoy the {s} at all.",
        "I would not recommend this {s} to anyone.",
        "the {o} was average, but the {s} was {a}.",
        "not good at all, a really {a} {s}.",
        "the {s} was worse than I had feared.",
        "I am very unhappy with the {s}.",
        "it is hard to imagine a more {a} {s}.",
        "{a}, {b}, and a waste of time.",
    ],
    "extras": [
        "never again.", "what a waste of money.", "one star.", "everyone complained.",
        "it ruined my day.", "I want my money back.",
    ],
}  # fmt: skip

TOPICS = {
    "sport": "match,goal,referee,team,coach,league,stadium,race,medal".split(","),
    "weather": "rain,storm,cloud,frost,sunshine,thunder,fog,snow,wind".split(","),
    "music": "melody,violin,choir,rhythm,drum,concert,chord,flute,opera".split(","),
    "cooking": "oven,recipe,butter,pan,flour,sauce,spoon,dough,salt".split(","),
    "travel": "suitcase,passport,airport,tourist,ticket,border,guide,luggage".split(","),
    "school": "teacher,pupil,lesson,exam,classroom,homework,blackboard,essay".split(","),
    "money": "bank,loan,price,tax,profit,budget,share,debt,invoice".split(","),
    "health": "doctor,fever,medicine,nurse,clinic,cough,patient,bandage".split(","),
    "nature": "forest,river,moss,deer,valley,meadow,fern,beetle,brook".split(","),
    "technology": "screen,battery,software,cable,keyboard,network,sensor,printer".split(","),
}

SAYINGS = [
    "There was a {a}, and then came the {b}.",
    "{p} talked about the {a} and the {b} all day.",
    "First the {a}, then the {b}, and at last the {c}.",
    "The {a} was more important than the {b}.",
    "{p} had never seen such a {a}; even the {b} was strange.",
    "Without a {a} there is no {b}.",
    "We read about the {a}, the {b} and the {c}.",
    "{p} wrote: the {a} is ready, but the {b} is not.",
]

CATEGORIES: dict[str, list[str]] = {
    "animal": "horse rabbit eagle wolf spider turtle salmon fox owl lion goat beetle whale".split(),
    "fruit": "apple pear cherry lemon plum peach banana grape mango fig melon apricot".split(),
    "colour": "red blue green yellow purple orange brown grey pink white black violet".split(),
    "tool": "hammer saw drill wrench shovel rake chisel axe pliers file trowel".split(),
    "vehicle": "car bus truck tractor bicycle ferry tram van motorcycle train wagon".split(),
    "number": "three seven twelve forty nine eleven sixty eight hundred thirty two five".split(),
    "country": "France Brazil Japan Kenya Canada Norway Egypt Peru India Italy Ghana Spain".split(),
    "person": [],
    "instrument": "piano violin flute drum trumpet guitar harp cello oboe banjo clarinet".split(),
    "garment": "coat hat shirt scarf glove skirt jacket sock sweater apron belt".split(),
    "metal": "iron copper silver gold tin lead zinc nickel steel brass".split(),
    "feeling": "joy anger fear sadness pride shame envy hope grief surprise".split(),
}

_DESCRIBE = [
    "Describe it.", "Put the data into words.", "Write a sentence with this information.",
    "Turn the record into text.", "Say it in plain English.", "Write a short description.",
    "Verbalise the facts.", "Describe the following in one or two sentences.", "Data to text:",
    "Make a text from the fields.", "Write it out.", "Use all the facts below in a sentence.",
    "Express this as running text.", "What do the data say?",
]  # fmt: skip
_EXTRACT = [
    "Extract the data.", "Turn the text into a record.", "Fill in the fields.", "Text to data:",
    "List the facts.", "Write the information as fields.", "Find the attributes.",
]  # fmt: skip
_ASK = ["Answer the question.", "Read and answer.", "Use the text to answer.", "Look it up."]
_SENTIMENT = [
    "Is this good or bad?", "Decide how the writer feels.", "Classify the opinion.",
    "What is the tone?", "Judge the review.", "Label the text.",
]  # fmt: skip

INSTRUCTIONS: dict[str, list[str]] = {
    "to-text": _DESCRIBE,
    "to-record": _EXTRACT,
    "one-field": _ASK,
    "yes-no": ["Does it follow?", "Is the statement right?", "Check the claim.", *_ASK[:1]],
    "lookup": ["Find the value.", "Look up the key.", "Which value belongs to the key?"],
    "story": _ASK,
    "opinion": _SENTIMENT,
    "topic": ["What is it about?", "Name the topic.", "Choose the subject.", "Label the text."],
    "category": ["Sort the words.", "Answer with one word.", "Think of the kind of thing."],
    "rewrite": ["Rewrite the sentence.", "Change the sentence in the same way.", "Rephrase:"],
    "words-copy": ["Copy the text.", "Repeat exactly.", "Write it again.", "Say the same."],
    "words-after": ["Copy what comes after the mark.", "Write the second part.", "After the mark:"],
    "words-before": ["Copy what comes before the mark.", "Write the first part."],
    "words-reverse": ["Reverse the order of the words.", "Write the words backwards."],
    "words-sort": ["Sort the words.", "Put the words in alphabetical order.", "Sort:"],
    "words-first": ["Write the first word.", "What is the first word?"],
    "words-last": ["Write the last word.", "What is the last word?"],
    "words-nth": ["Pick the right word.", "Which word is in that place?"],
    "words-upper": ["Write in capital letters.", "Make it upper case.", "Shout it."],
    "words-lower": ["Write in small letters.", "Make it lower case."],
    "words-initials": ["Write the first letter of each word.", "Initials:"],
    "words-join": ["Join the words with commas and 'and'.", "Make a list in words."],
    "words-unjoin": ["Split the list.", "Write the items one by one."],
    "words-dedupe": ["Remove the repeated words.", "Write each word once."],
    "words-remove": ["Leave the word out.", "Remove the word."],
    "words-replace": ["Replace the word.", "Exchange the word."],
    "words-repeat": ["Repeat the list.", "Say it more than once."],
    "words-next": ["Which word comes next?", "What follows the word?"],
    "words-count": ["How many words are there?", "Count the words."],
    "line-keywords": [
        "Write a sentence with these words.", "Make a sentence from the keywords.", "Keywords to text:",
        "Use the words in a sentence.",
    ],
    "line-shuffled": ["Put the words in the right order.", "Unscramble the sentence."],
    "line-half": ["Complete the sentence.", "Finish it.", "Write the whole sentence."],
    "line-unpunctuate": ["Remove the punctuation.", "Write it without punctuation."],
    "line-punctuate": ["Add punctuation and capitals.", "Restore the sentence."],
    "line-copy": ["Copy the sentence.", "Repeat the sentence word for word.", "Write it again."],
    "line-title": ["Write every word with a capital.", "Make a headline."],
    "line-first-words": ["Copy the beginning.", "How does it begin?"],
    "line-last-words": ["Copy the end.", "How does it end?"],
    "line-gap": ["Fill the gap.", "Which word is missing?"],
}  # fmt: skip
