export PYTHONUNBUFFERED=1 FLASHCORE_COMMIT=$1
D=2026-11-28; N=h200
( export CUDA_VISIBLE_DEVICES=0
for t in main next; do P=.; [ $t = next ] && P=.rows/next
PYTHONPATH=$P TRITON_CACHE_DIR=/tmp/tb_$t timeout 100 python3 .trial/bias.py bias_$t > /tmp/bias_$t.log 2>&1; echo "bias $t $? $SECONDS"
done
for t in main next; do P=.; [ $t = next ] && P=.rows/next
PYTHONPATH=$P TRITON_CACHE_DIR=/tmp/tb_$t timeout 60 python3 .trial/ragged.py ragged_$t > /tmp/ragged_$t.log 2>&1; echo "ragged $t $? $SECONDS"
done
cd .trial; PYTHONPATH=..:. timeout 70 python3 long2.py > /tmp/long2.log 2>&1; echo "long2 $? $SECONDS"
) &
( export CUDA_VISIBLE_DEVICES=1 PYTHONPATH=.rows/next
timeout 150 python3 -m flashcore.security.fuzz --seed 4 --problems 30000 --shards 24 --seconds 110 --shrink 0 --json $OUT/audit-fuzz-$N-$D-seed4.json > /tmp/fuzz.log 2>&1; echo "fuzz $? $SECONDS" ) &
wait
for f in bias_main bias_next ragged_main ragged_next long2 fuzz; do echo "== $f"; tail -c 9000 /tmp/$f.log; done > $OUT/logs.txt
for f in bias_main bias_next; do tail -n 20 /tmp/$f.log | cut -c1-260; done; tail -7 /tmp/long2.log; tail -5 /tmp/fuzz.log | cut -c1-400
rm -f $OUT/*.journal $OUT/*.log; ls $OUT
