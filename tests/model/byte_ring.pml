/* The protocol of csrc/ring/byte_ring.h, for exhaustive search by spin.
 *
 * Two producers, one consumer, an arena of four granules, slots of one and two granules, so that every slot of two
 * that would straddle the end is preceded by padding, and positions pass the end of the arena several times. One
 * producer may abandon its slots. Each atomic operation is one step; the plain stores of a slot's bytes are one step a
 * granule, apart from the mark that publishes them. Spin interleaves steps in one order for all, so the model checks
 * the protocol, not the memory orders: those are argued for in the header and looked at by ThreadSanitizer.
 *
 * Checked: a producer never writes into a granule that is not its own (overlap), the consumer reads the bytes that were
 * published, in order of reservation, each slot once (nothing lost, doubled or torn), marks of the free region are
 * zero (INVARIANT 1), head - tail <= capacity (INVARIANT 3), and no run ends before everything was read (no deadlock).
 *
 * Broken variants, one macro each, that the search must refute:
 *   RELEASE_BEFORE_READ  the tail passes a slot that is still being read
 *   MARK_BEFORE_BYTES    a slot is published before its bytes are written
 *   KEEP_MARKS           the consumer does not zero the marks that it has passed
 *   NO_TAIL_CHECK        a producer does not look at the tail again after its head has moved
 *   LOSE_ABANDONED       an abandoned slot gets no mark
 */

#define CAPACITY 4
#define SLOTS 2          /* of each producer */
#define TOTAL 4          /* SLOTS * 2 */

#define FREE 0
#define PUBLISHED 1
#define ABANDONED 2
#define PADDING 3

byte head = 0;                /* positions only grow: at most 2 * TOTAL and padding here */
byte tail = 0;
byte read_position = 0;

byte mark_state[CAPACITY];
byte mark_granules[CAPACITY];

byte owner[CAPACITY];         /* ghost: who may write a granule; 0 nobody, 1 and 2 the producers, 3 the consumer's */
byte bytes_of[CAPACITY];      /* what a granule holds: the number of the slot, 1.. */

byte order[TOTAL];            /* ghost: slot numbers in order of reservation */
bit order_abandoned[TOTAL];
byte reserved = 0;
byte consumed = 0;
byte finished = 0;

inline set_mark(position, granules, state)
{
    atomic {
        assert(mark_state[(position) % CAPACITY] == FREE);   /* INVARIANT 1 */
        mark_granules[(position) % CAPACITY] = granules;
        mark_state[(position) % CAPACITY] = state
    }
}

proctype Producer(byte me)
{
    byte slots = 0, need, seen_head, seen_tail, padding, position, room, i, number;
    bit abandons;

    do
    :: slots == SLOTS -> break
    :: else ->
        if
        :: need = 1
        :: need = 2
        fi;
        if
        :: abandons = 0
        :: me == 2 -> abandons = 1
        fi;
        number = (me - 1) * SLOTS + slots + 1;
        seen_head = head;                                     /* load */
retry:
        room = CAPACITY - seen_head % CAPACITY;
        padding = (need > room -> room : 0);
#ifdef NO_TAIL_CHECK
        if
        :: slots == 0 -> seen_tail = tail
        :: else
        fi;
#else
        seen_tail = tail;                                     /* load, acquire */
#endif
        if
#ifdef NO_TAIL_CHECK
        :: seen_head + padding + need - seen_tail > CAPACITY * 2 ->
#else
        :: seen_head + padding + need > seen_tail + CAPACITY ->
#endif
            /* Full, or an old head. The caller waits and asks again. */
            atomic { (head != seen_head || tail != seen_tail) -> seen_head = head };
            goto retry
        :: else
        fi;
        atomic {                                              /* compare and exchange */
            if
            :: head == seen_head ->
                head = seen_head + padding + need;
                assert(head - tail <= CAPACITY);              /* INVARIANT 3 */
                position = seen_head + padding;
                order[reserved] = number;
                order_abandoned[reserved] = abandons;
                reserved++;
                i = 0;
                do
                :: i < need ->
                    assert(owner[(position + i) % CAPACITY] == 0);
                    owner[(position + i) % CAPACITY] = me;
                    i++
                :: else -> break
                od
            :: else -> seen_head = head; goto retry
            fi
        };
        assert(position % CAPACITY + need <= CAPACITY);       /* INVARIANT 2: contiguous */
        if
        :: padding != 0 -> set_mark(seen_head, padding, PADDING)
        :: else
        fi;
#ifdef MARK_BEFORE_BYTES
        set_mark(position, need, (abandons -> ABANDONED : PUBLISHED));
#endif
        i = 0;
        do
        :: i < need ->
            bytes_of[(position + i) % CAPACITY] = number;     /* a plain store */
            i++
        :: else -> break
        od;
#ifdef LOSE_ABANDONED
        if
        :: !abandons -> set_mark(position, need, PUBLISHED)
        :: else
        fi;
#else
#ifndef MARK_BEFORE_BYTES
        set_mark(position, need, (abandons -> ABANDONED : PUBLISHED));
#endif
#endif
        slots++
    od;
    finished++
}

/* Reads what is marked; gives memory back when it likes, never past what it has read (a commit). */
proctype Consumer()
{
    byte state, granules, i, position;

    do
    :: consumed == TOTAL -> break
    :: read_position != tail ->                               /* release */
        atomic {
            position = tail;
            do
            :: position != read_position ->
                owner[position % CAPACITY] = 0;
                assert(mark_state[position % CAPACITY] == FREE);   /* INVARIANT 1 */
                position++
            :: else -> break
            od;
            tail = read_position
        }
    :: mark_state[read_position % CAPACITY] != FREE ->        /* peek: load, acquire */
        state = mark_state[read_position % CAPACITY];
        granules = mark_granules[read_position % CAPACITY];
#ifdef RELEASE_BEFORE_READ
        atomic {
            position = tail;
            do
            :: position != read_position + granules ->
                owner[position % CAPACITY] = 0;
                position++
            :: else -> break
            od;
            tail = read_position + granules
        };
#endif
        if
        :: state != PADDING ->
            assert(consumed < reserved);
            assert((state == ABANDONED) == order_abandoned[consumed]);
            i = 0;
            do
            :: i < granules ->
                assert(state == ABANDONED || bytes_of[(read_position + i) % CAPACITY] == order[consumed]);
                i++
            :: else -> break
            od;
            consumed++
        :: else
        fi;
#ifndef KEEP_MARKS
        mark_state[read_position % CAPACITY] = FREE;          /* advance: store, relaxed */
#endif
        read_position = read_position + granules
    od;
    assert(consumed == TOTAL)
}

init {
    atomic {
        run Producer(1);
        run Producer(2);
        run Consumer()
    }
}
